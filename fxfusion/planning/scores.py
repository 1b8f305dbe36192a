"""Scores: what windows of layers cost alone, and what whole plans cost after their refit.

Windows are measured from short to long, and hopeless ones are left out:

    size 1: what a road offers for a single layer; size 2: all; size 3: those whose two windows of size 2 cost no more
    than a ceiling; ...

Of many windows only the hopeful ones are measured closely (`halving.py`).

Source: arXiv 2503.18908, appendix B (windows of layers, picked greedily).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fxfusion.analysis.batches import Batch, text_key
from fxfusion.analysis.meter import PlanMeter, Qualities, plan_key
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.analysis.store import inside
from fxfusion.errors import NotFusedError, OptionError, PlanError, SurgeryError
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Limits
from fxfusion.planning.halving import FEWEST, Halving, steps
from fxfusion.planning.roads import ROADS, plan_of, window
from fxfusion.planning.roads.road import Segment
from fxfusion.recovery.refit import refit
from fxfusion.report.progress import reporting

Ceiling = Callable[[], float]

# Tokens: windows are screened on few, since there are many of them; a choice between the best few takes more; and
# those that a refit is tried with are few too, since it is tried often. The refit that follows the plan takes all.
SCREENED, JUDGED, FITTED = 2048, 4096, 8192
_JUDGES = 4  # at most one batch in so many judges


@dataclass(slots=True)
class Screen:
    """`costs`: increase of the loss [nats per token] of each segment alone; `refused`: why others cannot be had.

    `roads`: names, in order. `max_window`: layers of a window at most. `in_modules`: leave out windows that the model's
    modules cannot hold, as plans that are refitted need. `halving`: ranks many windows at a part of the price; without
    it `meter` measures each.
    """

    meter: PlanMeter
    roads: tuple[str, ...]
    norm: NormMode = "fold"
    limits: Limits = field(default_factory=Limits)
    max_window: int = 6
    progress: bool = False
    in_modules: bool = False
    halving: Halving | None = None
    costs: dict[Segment, float] = field(default_factory=dict)
    refused: dict[Segment, str] = field(default_factory=dict)
    layers: int = field(init=False)

    def __post_init__(self) -> None:
        unnumbered = [str(name) for name in self.meter.members if not isinstance(name, int)]
        if unnumbered:
            raise PlanError(f"layers hold more than one FFN, such as {unnumbered[0]}: roads need one in each")
        self.layers = self.meter.layers

    @property
    def mixers(self) -> tuple[int, ...]:
        return self.meter.mixers

    def run(self, ceiling: Ceiling) -> None:
        """Measure single layers, then windows of growing size. `ceiling()` is asked again before each size."""
        for size in range(1, min(self.max_window, self.layers) + 1):
            most = ceiling() if size > 1 else float("inf")
            for road in self.roads:  # hoist before wide: what costs too much hoisted is not tried wide
                offered = [one for one in self.windows(size, road) if self._hopes(one, most)]
                self._measure(f"{road}, {size} layer{'s' * (size > 1)}", offered)
            if size > 1 and not any(one.size == size for one in self.costs):
                return

    def windows(self, size: int, road: str) -> Iterator[Segment]:
        """All segments of one size that a road offers, or stands for."""
        for first in range(self.layers - size + 1):
            found = window(self.roads, road, first, first + size - 1, self.mixers)
            if found is not None and found.road == road:
                yield found

    def _hopes(self, one: Segment, ceiling: float) -> bool:
        """Whether the segment is allowed, and nothing that should be cheaper costs more than the ceiling."""
        if one.size == 1:
            return True
        if not self._allowed(one):
            return False
        shorter = ((one.first, one.last - 1), (one.first + 1, one.last)) if one.size > 2 else ()
        rivals = [window(self.roads, one.road, first, last, self.mixers) for first, last in shorter]
        cheaper = ROADS[one.road].cheaper
        if cheaper is not None and cheaper in self.roads:
            rivals.append(replace(one, road=cheaper))
        return all(rival is None or self.costs.get(rival, float("inf")) <= ceiling for rival in rivals)

    def _allowed(self, one: Segment) -> bool:
        known: Mapping[Member, tuple[int, int]] = self.meter.members
        if any(layer not in known for layer in one.layers):
            return False
        widths, sizes = zip(*(known[layer] for layer in one.layers), strict=True)
        return self.limits.allow(one.size, sum(widths), sum(sizes))

    def _measure(self, what: str, segments: Sequence[Segment]) -> None:
        unknown = [one for one in segments if one not in self.costs and one not in self.refused]
        halving = self.halving if len(unknown) > FEWEST else None
        count = len(unknown) if halving is None else steps(len(unknown))
        with reporting(self.progress and bool(unknown), f"windows: {what}", count) as advance:
            if halving is not None:
                self._halve(halving, unknown, advance)
            for segment in unknown if halving is None else ():
                self._measure_one(segment)
                advance(1)

    def _halve(self, halving: Halving, segments: Sequence[Segment], advance: Callable[[int], None]) -> None:
        plans = {}
        for segment in segments:
            try:
                plans[segment] = self._plan(segment)
            except SurgeryError as error:
                self.refused[segment] = str(error)
        self.costs |= halving.costs(plans, advance)
        self.refused |= halving.refused

    def _measure_one(self, segment: Segment) -> None:
        try:
            self.costs[segment] = increase(self.meter, self._plan(segment))
        except (NotFusedError, SurgeryError) as error:
            self.refused[segment] = str(error)

    def _plan(self, segment: Segment) -> FusionPlan:
        """Raises `SurgeryError` where modules cannot hold it, and must."""
        plan = plan_of([segment], self.mixers, self.norm)
        if self.in_modules and ROADS[segment.road].lowers_depth(segment):
            ROADS[segment.road].check(self.meter.model, self.meter.graph, plan)
        return plan


def increase(meter: PlanMeter, plan: FusionPlan) -> float:
    """By how much a plan raises the loss, in nats per token."""
    found = meter.quality(plan).loss_increase
    assert found is not None
    return float(found)


# --- after the refit ----------------------------------------------------------------------------------


def divided(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What to fit to, and what to judge by. Raises `OptionError` where there are fewer than two batches."""
    if len(batches) < 2:
        raise OptionError("after_refit needs two batches at least: one to fit to, one to judge by")
    judged = first(batches[: max(1, len(batches) // _JUDGES)], JUDGED)
    return first(batches[len(judged) :], FITTED), judged


def screened(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that windows are screened on."""
    return first(batches, SCREENED)


def in_fours(batches: Sequence[Batch]) -> list[Batch]:
    """The same text in smaller batches of one number of rows, a quarter of the tokens of the screen in each at most.

    Batches with anything but tensors of rows in them stay whole."""
    found: list[Batch] = []
    for batch in batches:
        parts = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        rows, length = parts["input_ids"].shape
        size = max(1, min(rows, SCREENED // 4 // length))
        if all(isinstance(value, Tensor) and value.shape[:1] == (rows,) for value in parts.values()):
            for start in range(0, rows, size):
                own = {name: value[start : start + size] for name, value in parts.items()}
                found.append(own if isinstance(batch, Mapping) else own["input_ids"])
        else:
            found.append(batch)
    return found


def first(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """As many of the first batches as hold so many tokens, one at least."""
    found: list[Batch] = []
    held = 0
    for batch in batches:
        if held < tokens:
            found.append(batch)
        held += (batch if isinstance(batch, Tensor) else batch["input_ids"]).numel()
    return found


class RefitMeter:
    """Quality of plans after `refit` towards the intact model. `meter`: measures the same plans as they are.

    `cache`: a folder; a plan that was refitted there before is not refitted again.
    """

    def __init__(self, meter: PlanMeter, fitted: Sequence[Batch], cache: str | os.PathLike[str] | None = None) -> None:
        self.meter, self.fitted = meter, list(fitted)
        path = inside(cache, "refitted_plans.json")
        self.known = Qualities(path, lambda: {**meter.facts(), "fitted": text_key(self.fitted), "sides": "both"})

    def knows(self, plan: FusionPlan) -> bool:
        """Whether it was measured before."""
        return self.known.get(plan_key(plan)) is not None

    def quality(self, plan: FusionPlan) -> Quality:
        """Loss on the judging text, and what is lost against the intact model; a plan of nothing is that itself."""
        if plan.changes_nothing:
            return self.meter.quality(plan)
        return self.known.of(plan_key(plan), lambda: self._measured(plan))

    def _measured(self, plan: FusionPlan) -> Quality:
        refitted = refit(self.meter.model, plan, self.fitted, reference="intact")
        return evaluate(refitted, self.meter.batches, self.meter.intact())
