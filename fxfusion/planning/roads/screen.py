"""What each window of layers costs on its own, on each road, measured; the hopeless ones are left out.

    size 2: all; size 3: those whose two windows of size 2 cost no more than a ceiling; ...

Source: issue 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxfusion.analysis.meter import PlanMeter
from fxfusion.errors import NotFusedError, OptionError, PlanError, SurgeryError
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.partition import Limits
from fxfusion.planning.roads.segment import Road, Segment, plan_of, windows
from fxfusion.progress import reporting

Ceiling = Callable[[], float]


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
            before = len(self.costs)
            for road in self.roads:  # hoist before wide: what costs too much hoisted is not tried wide
                self._measure(f"{road}, {size} layers", [one for one in self._of(size, road) if self._hopes(one, most)])
            if len(self.costs) == before:
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
        limits, sizes = self.limits, [known[layer] for layer in window.layers]
        bounds = (
            (window.size, limits.max_members),
            (sum(width for width, _ in sizes), limits.max_width),
            (sum(size for _, size in sizes), limits.max_bytes),
        )
        return all(bound is None or value <= bound for value, bound in bounds)

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
