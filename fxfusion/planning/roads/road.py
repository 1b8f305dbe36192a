"""What a road is: which runs of layers it offers, how one of them stands in a plan, and what that saves.

    layers     0  1  2  3  4  5  6  7          segments     [2, 3] hoist     [4, 5, 6] drop     [7] drop
    plan       groups: [{members: [2, 3], mixers: hoist}, [4, 5, 6]], dropped_attention: [5, 6, 7]

The attention of a segment's first layer stands before its FFNs already: no road needs to move or drop it.
A new road is one file with a `Road`, and its entry in `fxfusion.planning.roads.ROADS`: what measures, proposes and
chooses asks the road, and knows none by name. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import MixerMode, PlannedGroup


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """Layers `first` to `last`, whose FFNs become one (one layer: nothing is fused), on one road.

    `dropped`: layers in it that lose their attention; `road`: what becomes of the other attentions between the FFNs.
    """

    first: int
    last: int
    road: str
    dropped: tuple[int, ...] = ()

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def without(self, layer: int) -> Segment:
        """The same, with the attention of one more layer dropped."""
        return replace(self, dropped=tuple(sorted({*self.dropped, layer})))

    def keeping(self, layer: int) -> Segment:
        """The same, with the attention of one layer kept after all."""
        return replace(self, dropped=tuple(other for other in self.dropped if other != layer))


class Road:
    """One way to a single FFN where several layers were, or to none.

    `name`: as options name it. `mixers`: what a plan says of attention that is left between the FFNs. `cheaper`: the
    road, if any, on which the same run should cost less: where a run is hopeless on that one, it is not tried on this.
    """

    name: str
    mixers: MixerMode = "none"
    cheaper: str | None = None

    def lowers_depth(self, segment: Segment) -> bool:
        """Whether fewer FFNs are left with the segment."""
        return segment.size > 1

    def segment(self, first: int, last: int, mixers: Collection[int]) -> Segment | None:
        """The run of layers on this road; None where it offers none. `mixers`: layers that have attention."""
        return Segment(first, last, self.name) if last > first else None

    def parts(self, segment: Segment, mixers: Collection[int]) -> dict[str, list[Any]]:
        """What a segment adds to each field of a `FusionPlan`."""
        moved = any(layer in mixers and layer not in segment.dropped for layer in segment.layers[1:])
        group = PlannedGroup(segment.layers, self.mixers if moved else "none")
        return {"groups": [group] if segment.size > 1 else [], "dropped_attention": list(segment.dropped)}

    def is_in(self, plan: FusionPlan) -> bool:
        """Whether a plan has something of this road."""
        return any(group.mixers == self.mixers for group in plan.windows)

    def saves(self, segment: Segment, mixers: Collection[int], price: Callable[[FusionPlan], float]) -> float:
        """By how much a segment lowers the price of the model."""
        return price(FusionPlan()) - price(FusionPlan(**self.parts(segment, mixers)))

    def check(self, model: Any, graph: Any, plan: FusionPlan) -> None:
        """Raises `SurgeryError` where the model's own modules (not only its graph) cannot hold a plan of one segment,
        as a refit needs."""


# --- what becomes of the attention between the FFNs ---------------------------------------------------


class Drop(Road):
    """The attention between the FFNs is dropped; that of a single layer may be, too."""

    name = "drop"

    def segment(self, first: int, last: int, mixers: Collection[int]) -> Segment | None:
        start = first if first == last else first + 1
        dropped = tuple(layer for layer in range(start, last + 1) if layer in mixers)
        return Segment(first, last, self.name, dropped) if last > first or dropped else None

    def is_in(self, plan: FusionPlan) -> bool:
        return bool(plan.dropped_attention)


class Hoist(Road):
    """The attention of all layers goes first, one after another, as it is."""

    name = "hoist"
    mixers: MixerMode = "hoist"

    def check(self, model: Any, graph: Any, plan: FusionPlan) -> None:
        from fxfusion.models.ffn_surgery.recipe import FuseRecipe

        FuseRecipe.read(model, graph, plan)


class Wide(Hoist):
    """The attention of all layers goes first and reads one stream: one attention with the heads of all."""

    name = "wide"
    mixers = "wide"
    cheaper = "hoist"


# --- no FFN is left -----------------------------------------------------------------------------------


class Remove(Road):
    """One layer goes whole, attention and FFN. Several in a row are as many segments."""

    name = "remove"

    def segment(self, first: int, last: int, mixers: Collection[int]) -> Segment | None:
        return Segment(first, last, self.name) if first == last else None

    def lowers_depth(self, segment: Segment) -> bool:
        return True

    def parts(self, segment: Segment, mixers: Collection[int]) -> dict[str, list[Any]]:
        return {"removed": list(segment.layers)}

    def is_in(self, plan: FusionPlan) -> bool:
        return bool(plan.removed)
