"""Candidate plans: ways to fuse the FFNs of a model once some attention is gone, for each number of FFNs left.

Three ways are tried at each depth, since no measure of dependency orders plans perfectly: even cuts of each chain
without its ends (what the paper does by eye), and with them; the partition with the least sum of the matrix inside
groups; and the one with the least largest entry. Which is best is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxfusion.analysis.meter import ChainFacts
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.partition import Limits, PartitionTable, combine, partition_chain


@dataclass(frozen=True, slots=True)
class DroppedModel:
    """A model without some attention: its chains, and the dependency matrix of each, `[members, members]`.

    `ffns`: FFNs of the whole model, in chains or not.
    """

    dropped: tuple[int, ...]
    chains: tuple[ChainFacts, ...]
    matrices: tuple[Tensor, ...]
    ffns: int

    @property
    def outside(self) -> int:
        """FFNs that are in no chain."""
        return self.ffns - sum(len(chain.members) for chain in self.chains)

    def plan(self, groups: Sequence[Sequence[Member]], norm: NormMode) -> FusionPlan:
        return FusionPlan(dropped_attention=self.dropped, groups=tuple(map(tuple, groups)), norm=norm)

    def depth(self, groups: Sequence[Sequence[Member]]) -> int:
        """FFNs one behind the other when these groups are fused."""
        return self.ffns - sum(len(group) - 1 for group in groups)

    def bytes_of(self, groups: Sequence[Sequence[Member]]) -> int:
        """Memory of the wide weights."""
        size = {name: size for chain in self.chains for name, size in zip(chain.members, chain.bytes, strict=True)}
        return sum(size[member] for group in groups for member in group)


def tables(model: DroppedModel, limits: Limits) -> tuple[PartitionTable, ...]:
    """The best partitions of all chains together, by the sum of dependencies and by the largest one."""
    if not model.chains:
        return ()
    kinds: list[PartitionTable] = []
    for cost in ("sum", "max"):
        found = [
            partition_chain(
                matrix, layers=chain.members, widths=chain.widths, sizes=chain.bytes, limits=limits, cost=cost
            )
            for chain, matrix in zip(model.chains, model.matrices, strict=True)
        ]
        kinds.append(combine(found))
    return tuple(kinds)


def candidates(model: DroppedModel, limits: Limits, depth: int) -> Iterator[tuple[tuple[Member, ...], ...]]:
    """Groups that leave `depth` FFNs in the whole model; none twice."""
    seen: set[tuple[tuple[Member, ...], ...]] = set()
    for groups in _all_candidates(model, limits, depth):
        ordered = tuple(groups)
        if ordered not in seen and model.depth(ordered) == depth:
            seen.add(ordered)
            yield ordered


def _all_candidates(model: DroppedModel, limits: Limits, depth: int) -> Iterator[tuple[tuple[Member, ...], ...]]:
    if depth == model.ffns:
        yield ()
    for ends in ((1, 1), (0, 1), (1, 0), (0, 0)):
        groups = equal_cuts(model, depth, *ends)
        if groups is not None and all(_allowed(model, group, limits) for group in groups):
            yield groups
    for table in tables(model, limits):
        inside = depth - model.outside
        found = table[inside] if 1 <= inside <= table.ffns else None
        if found is not None:
            yield found.fused


def equal_cuts(model: DroppedModel, depth: int, leading: int, last: int) -> tuple[tuple[Member, ...], ...] | None:
    """Each chain without its leading member (`leading` 1) and its last (`last` 1), cut into groups of even length.

    Groups go to the chains so that the longest group is as short as the depth allows. None if no cut gives the depth.
    """
    runs = []
    for chain in model.chains:
        start = leading if chain.leading else 0
        run = chain.members[start : len(chain.members) - last]
        if len(run) > 1:
            runs.append(run)
    if not runs:
        return None
    pieces = [1] * len(runs)
    merged = model.ffns - depth
    while sum(len(run) - piece for run, piece in zip(runs, pieces, strict=True)) > merged:
        longest = max(range(len(runs)), key=lambda index: (len(runs[index]) / pieces[index], index))
        pieces[longest] += 1
    if sum(len(run) - piece for run, piece in zip(runs, pieces, strict=True)) != merged:
        return None
    cut = [group for run, piece in zip(runs, pieces, strict=True) for group in _evenly(run, piece)]
    return tuple(group for group in cut if len(group) > 1)


def shallowest(model: DroppedModel, limits: Limits) -> int:
    """The least number of FFNs that the limits allow."""
    found = tables(model, limits)
    return model.ffns if not found else model.outside + next(iter(found[0])).depth


def _evenly(run: Sequence[Member], pieces: int) -> list[tuple[Member, ...]]:
    bounds = [round(index * len(run) / pieces) for index in range(pieces + 1)]
    return [tuple(run[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _allowed(model: DroppedModel, group: Sequence[Member], limits: Limits) -> bool:
    for chain, matrix in zip(model.chains, model.matrices, strict=True):
        if group[0] in chain.members:
            first = chain.members.index(group[0])
            part = slice(first, first + len(group))
            facts = replace(chain, members=chain.members[part], widths=chain.widths[part], bytes=chain.bytes[part])
            return _fits(facts, matrix[part, part], limits)
    return False


def _fits(group: ChainFacts, matrix: Tensor, limits: Limits) -> bool:
    largest = float(torch.triu(matrix, 1).max())
    bounds = (
        (len(group.members), limits.max_members),
        (sum(group.widths), limits.max_width),
        (sum(group.bytes), limits.max_bytes),
        (largest, limits.max_dependency),
    )
    return all(bound is None or value <= bound for value, bound in bounds)
