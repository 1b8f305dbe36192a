"""Ways to cut runs of FFNs into groups, on a step's sublayers: whole, into even parts, by memory.

    run of widths   4 4 4 4 4 4 4        room for 12: 4+4+4 | 4+4+4 | 4      filled from the left
                                         the same number, even: 4+4+4 | 4+4 | 4+4

Each group is one all-reduce, so the fewest groups are the least communication; of cuts with as many groups the one
whose widest group is narrowest needs the least memory while it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fxfusion.cost.sublayers import Attention, Ffn, Step, Sublayer
from fxfusion.plan.policy import FusionPolicy

Run = tuple[int, ...]  # positions of neighbouring FFNs among the sublayers
Cut = tuple[Run, ...]


def fusable_runs(step: Step, policy: FusionPolicy) -> tuple[Run, ...]:
    """Runs of two or more FFNs that a policy's ends leave."""
    found: list[Run] = []
    current: list[int] = []
    for place, part in enumerate((*step.sublayers, None)):
        if isinstance(part, Ffn):
            current.append(place)
            continue
        if current:
            leads = _leads(step.sublayers, current[0]) and not policy.include_leading
            run = tuple(current[int(leads) : len(current) - policy.keep_last])
            if len(run) >= policy.min_members:
                found.append(run)
        current = []
    return tuple(found)


def _leads(parts: Sequence[Sublayer], place: int) -> bool:
    """Whether the FFN's own layer holds the mixer before it."""
    before = parts[place - 1] if place else None
    return isinstance(before, Attention) and before.layers[-1:] == parts[place].layers[:1]


def fill(run: Run, sizes: Sequence[float], room: float) -> Cut:
    """From the left, each group as many as have room; one that has none alone is a group by itself."""
    groups: list[list[int]] = []
    used = 0.0
    for place, size in zip(run, sizes, strict=True):
        if not groups or used + size > room:
            groups.append([])
            used = 0.0
        groups[-1].append(place)
        used += size
    return tuple(map(tuple, groups))


def even(run: Run, sizes: Sequence[float], count: int) -> Cut:
    """At most `count` groups, the widest of them as narrow as can be."""
    sums = {sum(sizes[start:end]) for start in range(len(sizes)) for end in range(start + 1, len(sizes) + 1)}
    rooms = sorted(room for room in sums if room >= max(sizes))
    low, high = 0, len(rooms) - 1
    while low < high:
        middle = (low + high) // 2
        if len(fill(run, sizes, rooms[middle])) <= count:
            high = middle
        else:
            low = middle + 1
    return fill(run, sizes, rooms[low])


def fused(step: Step, cuts: Iterable[Cut]) -> Step:
    """The step with each group of two or more as one FFN."""
    parts: list[Sublayer | None] = list(step.sublayers)
    for group in (group for cut in cuts for group in cut if len(group) > 1):
        members = [part for place in group if isinstance(part := step.sublayers[place], Ffn)]
        layers = tuple(dict.fromkeys(layer for part in members for layer in part.layers))
        width, count = sum(part.width for part in members), sum(part.members for part in members)
        for place in group:
            parts[place] = None
        parts[group[0]] = replace(members[0], width=width, members=count, layers=layers)
    return replace(step, sublayers=tuple(part for part in parts if part is not None))
