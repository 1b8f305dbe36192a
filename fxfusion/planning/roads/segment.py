"""What a plan is made of: disjoint segments of decoder layers, each taking one road to a single FFN.

    layers     0  1  2  3  4  5  6  7          segments     [2, 3] hoist     [4, 5, 6] drop     [7] drop
    plan       groups: [{members: [2, 3], mixers: hoist}, [4, 5, 6]], dropped_attention: [5, 6, 7]

The attention of a segment's first layer stands before its FFNs already: no road needs to move or drop it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import PlannedGroup
from fxfusion.plan.policy import NormMode

Road = Literal["drop", "hoist", "wide"]
ROADS: tuple[Road, ...] = get_args(Road)


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
