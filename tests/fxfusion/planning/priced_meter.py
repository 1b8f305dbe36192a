"""A meter whose losses are set by hand, so that the best plan can be found by trying all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Estimate, Quality
from fxfusion.errors import NotFusedError
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.planning.roads import ROADS, plan_of
from fxfusion.planning.roads.road import Segment
from tests.tiny_lm import TinyLm

LAYERS = 6
Loss = Callable[[FusionPlan], float]


def loss_of(plan: FusionPlan) -> float:
    """Early layers cost more; hoisting 0.01 for each merge and layer distance, wide twice that, dropping 0.03 each,
    removing 0.05."""
    total = sum(0.05 / (1 + layer) for layer in plan.removed)
    total += sum(0.03 / (1 + layer) for layer in plan.dropped_attention)
    for group in plan.groups:
        rate = {"hoist": 0.01, "wide": 0.02, "none": 0.002}[group.mixers]
        total += rate * (len(group) - 1) ** 2 / (1 + int(group[0]))
    return total


class PricedMeter(PlanMeter):
    """`quality` is `loss(plan)`; windows in `refused` cannot be had; layers in `lacking` have no FFN to fuse,
    those not in `mixers` no attention.

    `asked`: the plans that were measured.
    """

    def __init__(
        self,
        loss: Loss = loss_of,
        refused: Sequence[Sequence[int]] = (),
        layers: int = LAYERS,
        lacking: Sequence[int] = (),
        noise: float = 0.0,
        mixers: Sequence[int] | None = None,
    ) -> None:
        self.noise = noise
        self.with_mixer = tuple(range(layers) if mixers is None else mixers)
        self.lacking = lacking
        self.model = TinyLm(layers)
        self.batches = []
        self.loss, self.refused, self.layers = loss, [tuple(one) for one in refused], layers
        self.asked: list[FusionPlan] = []

    @property
    def mixers(self) -> tuple[int, ...]:
        return self.with_mixer

    @property
    def members(self) -> Mapping[Member, tuple[int, int]]:
        return {layer: (8 + layer, 100) for layer in range(self.layers) if layer not in self.lacking}

    @property
    def ffns(self) -> int:
        return self.layers

    def quality(self, plan: FusionPlan) -> Quality:
        self.asked.append(plan)
        for group in plan.groups:
            if any(set(one) <= set(group) for one in self.refused) and group.is_window:
                raise NotFusedError(f"the plan does not fit this model: window {list(group)}: it cannot move")
        return quality_of(self.loss(plan), self.noise)


def quality_of(loss: float, noise: float = 0.0) -> Quality:
    """`noise`: how far the interval reaches to both sides."""
    one = Estimate(float(loss), float(loss - noise), float(loss + noise))
    return Quality(loss=one, perplexity=one.exp(), tokens=1, sequences=2, kl=one, top1=one, loss_increase=one)


def all_plans(layers: int, roads: Sequence[str] = tuple(ROADS), most: int = 6) -> Iterator[FusionPlan]:
    """Every plan of disjoint segments, with at most one attention dropped beside those that the road drops."""
    segments: list[Segment] = []
    for first in range(layers):
        for last in range(first, min(layers, first + most)):
            for road in ("drop", "hoist", "wide") if last > first else ():
                if road in roads:
                    plain = Segment(first, last, road, tuple(range(first + 1, last + 1)) if road == "drop" else ())
                    more = [layer for layer in plain.layers if layer not in plain.dropped] if "drop" in roads else []
                    segments += [plain, *(plain.without(layer) for layer in more)]
        segments += [Segment(first, first, "drop", (first,))] if "drop" in roads else []
        segments += [Segment(first, first, "remove")] if "remove" in roads else []
    for chosen in _disjoint(segments, 0, layers):
        yield plan_of(chosen, range(layers))


def _disjoint(segments: Sequence[Segment], start: int, layers: int) -> Iterator[list[Segment]]:
    if start >= layers:
        yield []
        return
    yield from _disjoint(segments, start + 1, layers)
    for segment in segments:
        if segment.first == start:
            for rest in _disjoint(segments, segment.last + 1, layers):
                yield [segment, *rest]
