"""Where the intermediate channels of each member stand in the wide FFN.

shards=1:  all of member 0, all of member 1, ...
shards=2:  first halves of members 0, 1, ...; then their second halves

The order of intermediate channels does not matter to an FFN, as long as gate, up and down agree. It matters to
tensor parallelism, which cuts the wide FFN into equal runs of channels: with as many shards as devices, each device
holds a slice of every member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Run:
    """Channels `own : own + length` of a member, at `wide : wide + length` in the wide FFN."""

    wide: int
    own: int
    length: int


def spread(widths: Sequence[int], shards: int) -> list[tuple[Run, ...]]:
    """The runs of each member, in its own order.

    Shards end where equal cuts of the whole do: each `ceil(sum / shards)` channels, the last one shorter, as
    `torch.chunk` and DTensor's `Shard` cut. Each takes of a member what is proportional to its width, rounded.
    """
    total = sum(widths)
    size = -(-total // shards)
    found: list[list[Run]] = [[] for _ in widths]
    wide, begun = 0, [0] * len(widths)
    for end in range(size, total + size, size):
        ended = _share(widths, min(end, total))
        for member, (first, last) in enumerate(zip(begun, ended, strict=True)):
            if last > first:
                found[member].append(Run(wide, first, last - first))
                wide += last - first
        begun = ended
    return [tuple(runs) for runs in found]


def _share(widths: Sequence[int], seats: int) -> list[int]:
    """How many of the first `seats` channels are each member's, in proportion to the widths (Sainte-Lague, so that
    no member's share falls where seats are added)."""
    if seats == sum(widths):
        return list(widths)
    places = torch.cat([(torch.arange(width, dtype=torch.float64) + 0.5) / width for width in widths])
    owners = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    first = owners[places.argsort(stable=True)[:seats]]
    return torch.bincount(first, minlength=len(widths)).tolist()
