"""Are two regions the same computation, up to the constants they read?

A region is written down as a list of entries in graph order: operation, literals, dtypes, and where
each argument comes from. Two regions are isomorphic when their lists are equal; when they are not,
the first differing entry says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import fx

from fxfusion.errors import RefusalCode
from fxfusion.graph import ops


@dataclass(frozen=True, slots=True)
class Entry:
    """One node of a region: what it does, its literals, its result's dtype, its arguments' places."""

    op: str
    literals: str
    dtype: str
    wiring: str


Structure = tuple[Entry, ...]


def describe_region(
    nodes: Sequence[fx.Node], names: Mapping[fx.Node, str], sizes: Mapping[int, str] = MappingProxyType({})
) -> Structure:
    """The region's structure. `names` gives the roles of the values that come from outside; `sizes` those of whole
    numbers that may be other ones in another region.

    Values without a role keep their own node name, so that only regions that read the very same
    value are isomorphic.
    """
    places = dict(names)
    entries = []
    for index, node in enumerate(nodes):
        literals, wiring = _arguments(node, places, sizes)
        entries.append(
            Entry(ops.op_identity(node), literals, ops.dtype_name(node) or type(ops.example(node)).__name__, wiring)
        )
        places[node] = f"%{index}"
    return tuple(entries)


def first_difference(left: Structure, right: Structure) -> tuple[RefusalCode, str] | None:
    """Why two structures differ, or None when they are equal."""
    for one, other in zip(left, right, strict=False):
        if one.op != other.op:
            return RefusalCode.DIFFERENT_OPS, f"{one.op} here, {other.op} there"
        if one.dtype != other.dtype:
            return RefusalCode.DIFFERENT_DTYPE, f"{one.op} gives {one.dtype} here, {other.dtype} there"
        if one.literals != other.literals:
            return RefusalCode.DIFFERENT_LITERAL, f"{one.op}({one.literals}) here, {other.op}({other.literals}) there"
        if one.wiring != other.wiring:
            return RefusalCode.DIFFERENT_OPS, f"the arguments of {one.op} come from different places"
    if len(left) != len(right):
        longer = max(left, right, key=len)[min(len(left), len(right))]
        return RefusalCode.DIFFERENT_OPS, f"only one of the two has {longer.op}"
    return None


def _arguments(node: fx.Node, places: Mapping[fx.Node, str], sizes: Mapping[int, str]) -> tuple[str, str]:
    """The literals and, separately, the places of the node arguments; both with their positions."""
    wiring: list[str] = []

    def note(found: fx.Node) -> str:
        place = places.get(found, f"={found.name}")
        wiring.append(place)
        return "_"

    literals = fx.node.map_arg((node.args, dict(sorted(node.kwargs.items()))), note)
    return _plain(literals, sizes), ",".join(wiring)


def _plain(value: Any, sizes: Mapping[int, str]) -> str:
    """A stable text of literals: no addresses, floats exactly."""
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_plain(item, sizes) for item in value) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_plain(item, sizes)}" for key, item in value.items()) + "}"
    return sizes.get(value, repr(value)) if type(value) is int else repr(value)
