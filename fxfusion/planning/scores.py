"""What plans over roads are made of, and what is measured: windows of layers alone, whole plans after their refit.

    layers     0  1  2  3  4  5  6  7          segments     [2, 3] hoist     [4, 5, 6] drop     [7] drop
    plan       groups: [{members: [2, 3], mixers: hoist}, [4, 5, 6]], dropped_attention: [5, 6, 7]

A segment is a run of decoder layers that takes one road to a single FFN. The attention of its first layer stands before
its FFNs already: no road needs to move or drop it. Hopeless windows are left out:

    size 2: all; size 3: those whose two windows of size 2 cost no more than a ceiling; ...

Source: arXiv 2503.18908, appendix B (windows of layers, picked greedily).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from fxfusion.analysis.batches import Batch, text_key
from fxfusion.analysis.meter import PlanMeter, Qualities, plan_key
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.analysis.store import inside
from fxfusion.errors import NotFusedError, OptionError, PlanError, SurgeryError
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.groups import PlannedGroup
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Limits
from fxfusion.recovery.refit import refit
from fxfusion.report.progress import reporting

Road = Literal["drop", "hoist", "wide"]
ROADS: tuple[Road, ...] = get_args(Road)
Ceiling = Callable[[], float]

# Tokens: windows are screened on few, since there are many of them; a choice between the best few takes more; and
# those that a refit is tried with are few too, since it is tried often. The refit that follows the plan takes all.
_SCREENED, _JUDGED, _FITTED = 2048, 4096, 8192
_JUDGES = 4  # at most one batch in so many judges


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """Layers `first` to `last`, whose FFNs become one (one layer: nothing is fused), on one road.

    `dropped`: layers in it that lose their attention; `road`: what becomes of the other attentions between the FFNs.
    """

    first: int
    last: int
    road: Road
    dropped: tuple[int, ...] = ()

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def group(self, mixers: Collection[int]) -> PlannedGroup | None:
        """As a plan names it. `mixers`: layers that have attention (or another mixer)."""
        if self.size < 2:
            return None
        moved = [layer for layer in self.layers[1:] if layer in mixers and layer not in self.dropped]
        return PlannedGroup(self.layers, "none" if self.road == "drop" or not moved else self.road)

    def without(self, layer: int) -> Segment:
        """The same, with the attention of one more layer dropped."""
        return Segment(self.first, self.last, self.road, tuple(sorted({*self.dropped, layer})))

    def keeping(self, layer: int) -> Segment:
        """The same, with the attention of one layer kept after all."""
        return Segment(self.first, self.last, self.road, tuple(other for other in self.dropped if other != layer))


def is_on_one_road(plan: FusionPlan) -> bool:
    """Whether nothing is dropped, or nothing is moved in one way or the other."""
    return len({group.mixers for group in plan.windows}) + bool(plan.dropped_attention) <= 1


def check_roads(roads: Iterable[Any]) -> tuple[Road, ...]:
    """In a fixed order. Raises `OptionError`."""
    given = [roads] if isinstance(roads, str) else list(roads)
    unknown = [road for road in given if road not in ROADS]
    if unknown or not given:
        named = repr(unknown[0]) if unknown else "none"
        raise OptionError(f"roads: expected some of {', '.join(ROADS)}, got {named}")
    return tuple(road for road in ROADS if road in given)


def windows(layers: int, roads: Sequence[Road], mixers: Collection[int], size: int) -> Iterator[Segment]:
    """All segments of one size, each road in turn; where no attention lies between the FFNs, one road is enough."""
    for first in range(layers - size + 1):
        inner = tuple(layer for layer in range(first + 1, first + size) if layer in mixers)
        for road in roads if inner else roads[:1]:
            yield Segment(first, first + size - 1, road, inner if road == "drop" else ())


def plan_of(segments: Iterable[Segment], mixers: Collection[int], norm: NormMode = "fold") -> FusionPlan:
    """The plan of disjoint segments."""
    ordered = sorted(segments)
    groups = [segment.group(mixers) for segment in ordered]
    return FusionPlan(
        groups=[group for group in groups if group is not None],
        dropped_attention=[layer for segment in ordered for layer in segment.dropped],
        norm=norm,
    )


@dataclass(slots=True)
class Screen:
    """`costs`: increase of the loss [nats per token] of each segment alone; `refused`: why others cannot be had.

    `max_window`: layers of a window at most. `in_modules`: leave out windows that the model's modules cannot hold, as
    plans that are refitted need.
    """

    meter: PlanMeter
    roads: tuple[Road, ...]
    norm: NormMode = "fold"
    limits: Limits = field(default_factory=Limits)
    max_window: int = 6
    progress: bool = False
    in_modules: bool = False
    costs: dict[Segment, float] = field(default_factory=dict)
    refused: dict[Segment, str] = field(default_factory=dict)
    layers: int = field(init=False)

    def __post_init__(self) -> None:
        if self.max_window < 2:
            raise OptionError(f"max_window: expected at least 2 layers, got {self.max_window}")
        if self.limits.max_dependency is not None:
            raise OptionError("max_dependency: windows are judged by their measured loss; it goes without roads only")
        unnumbered = [str(name) for name in self.meter.members if not isinstance(name, int)]
        if unnumbered:
            raise PlanError(f"layers hold more than one FFN, such as {unnumbered[0]}: roads need one in each")
        self.layers = self.meter.layers

    @property
    def mixers(self) -> tuple[int, ...]:
        return self.meter.mixers

    def run(self, ceiling: Ceiling) -> None:
        """Measure single drops, then windows of growing size. `ceiling()` is asked again before each size."""
        if "drop" in self.roads:
            self._measure("attention", [Segment(layer, layer, "drop", (layer,)) for layer in self.mixers])
        for size in range(2, min(self.max_window, self.layers) + 1):
            most = ceiling()
            for road in self.roads:  # hoist before wide: what costs too much hoisted is not tried wide
                self._measure(f"{road}, {size} layers", [one for one in self._of(size, road) if self._hopes(one, most)])
            if not any(one.size == size for one in self.costs):
                return

    def _of(self, size: int, road: Road) -> Iterator[Segment]:
        return (one for one in windows(self.layers, self.roads, self.mixers, size) if one.road == road)

    def _hopes(self, window: Segment, ceiling: float) -> bool:
        """Whether the window is allowed, and nothing that should be cheaper costs more than the ceiling."""
        if not self._allowed(window):
            return False
        rivals = [one for one in _inside(window, self.mixers, self.roads) if one.size > 1]
        if window.road == "wide" and "hoist" in self.roads:
            rivals.append(replace(window, road="hoist"))
        return all(self.costs.get(one, float("inf")) <= ceiling for one in rivals)

    def _allowed(self, window: Segment) -> bool:
        known: Mapping[Member, tuple[int, int]] = self.meter.members
        if any(layer not in known for layer in window.layers):
            return False
        widths, sizes = zip(*(known[layer] for layer in window.layers), strict=True)
        return self.limits.allow(window.size, sum(widths), sum(sizes))

    def _measure(self, what: str, segments: Sequence[Segment]) -> None:
        with reporting(self.progress and bool(segments), f"windows: {what}", len(segments)) as advance:
            for segment in segments:
                if segment not in self.costs and segment not in self.refused:
                    self._measure_one(segment)
                advance(1)

    def _measure_one(self, segment: Segment) -> None:
        plan = plan_of([segment], self.mixers, self.norm)
        try:
            if self.in_modules and segment.size > 1 and segment.road != "drop":
                FuseRecipe.read(self.meter.model, self.meter.graph, plan)
            self.costs[segment] = increase(self.meter, plan)
        except (NotFusedError, SurgeryError) as error:
            self.refused[segment] = str(error)


def increase(meter: PlanMeter, plan: FusionPlan) -> float:
    """By how much a plan raises the loss, in nats per token."""
    found = meter.quality(plan).loss_increase
    assert found is not None
    return float(found)


def _inside(window: Segment, mixers: Sequence[int], roads: Sequence[Road]) -> Iterator[Segment]:
    """The two windows one layer shorter, on the same road where that makes a difference."""
    for first, last in ((window.first, window.last - 1), (window.first + 1, window.last)):
        inner = tuple(layer for layer in range(first + 1, last + 1) if layer in mixers)
        road = window.road if inner else roads[0]
        yield Segment(first, last, road, inner if road == "drop" else ())


# --- after the refit ----------------------------------------------------------------------------------


def divided(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What to fit to, and what to judge by. Raises `OptionError` where there are fewer than two batches."""
    if len(batches) < 2:
        raise OptionError("after_refit needs two batches at least: one to fit to, one to judge by")
    judged = first(batches[: max(1, len(batches) // _JUDGES)], _JUDGED)
    return first(batches[len(judged) :], _FITTED), judged


def screened(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that windows are screened on."""
    return first(batches, _SCREENED)


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
        self.known = Qualities(path, lambda: {**meter.facts(), "fitted": text_key(self.fitted)})

    def knows(self, plan: FusionPlan) -> bool:
        """Whether it was measured before."""
        return self.known.get(plan_key(plan)) is not None

    def quality(self, plan: FusionPlan) -> Quality:
        """Loss on the judging text, and what is lost against the intact model; a plan of nothing is that itself."""
        if not plan.groups and not plan.dropped_attention:
            return self.meter.quality(plan)
        return self.known.of(plan_key(plan), lambda: self._measured(plan))

    def _measured(self, plan: FusionPlan) -> Quality:
        refitted = refit(self.meter.model, plan, self.fitted, reference="intact")
        return evaluate(refitted, self.meter.batches, self.meter.intact())
