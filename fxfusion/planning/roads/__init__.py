"""The roads to fewer FFNs, in the order in which they are tried; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import NormMode
from fxfusion.planning.roads.road import Drop, Hoist, Remove, Road, Segment, Wide

_ALL: tuple[Road, ...] = (Drop(), Hoist(), Wide(), Remove())
ROADS: dict[str, Road] = {road.name: road for road in _ALL}


def check_roads(roads: Iterable[Any]) -> tuple[str, ...]:
    """In the order of `ROADS`. Raises `OptionError`."""
    given = [roads] if isinstance(roads, str) else list(roads)
    unknown = [road for road in given if road not in ROADS]
    if unknown or not given:
        named = repr(unknown[0]) if unknown else "none"
        raise OptionError(f"roads: expected some of {', '.join(ROADS)}, got {named}")
    return tuple(road for road in ROADS if road in given)


def window(roads: Sequence[str], road: str, first: int, last: int, mixers: Collection[int]) -> Segment | None:
    """A run of layers on one road. Where no attention lies between its FFNs, all roads are one, and the first of them
    stands for it."""
    same = last > first and not any(layer in mixers for layer in range(first + 1, last + 1))
    return ROADS[roads[0] if same else road].segment(first, last, mixers)


def plan_of(segments: Iterable[Segment], mixers: Collection[int], norm: NormMode = "fold") -> FusionPlan:
    """The plan of disjoint segments."""
    fields: dict[str, list[Any]] = {}
    for segment in sorted(segments):
        for name, values in ROADS[segment.road].parts(segment, mixers).items():
            fields.setdefault(name, []).extend(values)
    return FusionPlan(**fields, norm=norm)


def is_on_one_road(plan: FusionPlan) -> bool:
    """Whether a plan has something of one road at most."""
    return sum(road.is_in(plan) for road in ROADS.values()) <= 1
