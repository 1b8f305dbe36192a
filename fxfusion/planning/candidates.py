"""Cut chains of FFNs into groups that depend least on each other's order, for every number of groups at once.

    chain        42 43 44 45 46 47             M[i, j]: how much FFN j depends on FFN i before it
    partition    (42 43 44) (45) (46 47)       3 FFNs remain; 45 stays as it is

The cost of a group is the sum of M over its pairs (or the largest entry); fusing costs nothing between groups, since
a group reads what the group before it wrote. The least cost into k groups comes from the least costs into k - 1 of
everything in front of the last group, so dynamic programming finds it exactly.

Source: arXiv 2503.18908, section 4 (the dependency matrix; there the groups were picked by eye).

Candidate plans, for each number of FFNs left once some attention is gone, are of three kinds, since no measure of
dependency orders plans perfectly: even cuts of each chain without its ends (what the paper does by eye), and with them;
the partition with the least sum of the matrix inside groups; and the one with the least largest entry. Which is best is
measured, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxfusion.analysis.meter import ChainFacts
from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Limits

Cost = Literal["sum", "max"]


@dataclass(frozen=True, slots=True)
class Partition:
    """One way to cut: every FFN is in one of `groups`, and a group of one stays unfused.

    `total`: sum of the matrix's entries inside the groups; `largest`: the largest of them, at least 0.
    """

    groups: tuple[tuple[Member, ...], ...]
    total: float
    largest: float

    @property
    def depth(self) -> int:
        """The FFN depth that remains."""
        return len(self.groups)

    @property
    def fused(self) -> tuple[tuple[Member, ...], ...]:
        """The groups of two or more, as `FusionPlan(groups=...)` takes them."""
        return tuple(group for group in self.groups if len(group) > 1)


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """The best partition into each number of FFNs: `table[k]` for `1 <= k <= table.ffns`, None if there is none.

    `cost`: what was minimised, `"sum"` (`total`) or `"max"` (`largest`).
    """

    partitions: tuple[Partition | None, ...]
    cost: Cost = "sum"

    @property
    def ffns(self) -> int:
        return len(self.partitions)

    def __getitem__(self, depth: int) -> Partition | None:
        if not 1 <= depth <= self.ffns:
            raise IndexError(f"depth {depth} is not in 1 to {self.ffns}")
        return self.partitions[depth - 1]

    def __iter__(self) -> Iterator[Partition]:
        """The partitions that exist, from the shallowest to the one that fuses nothing."""
        return (partition for partition in self.partitions if partition is not None)

    def at(self, depth: int) -> Partition:
        """The partition into exactly `depth` FFNs. Raises `PlanError` that says what is possible."""
        found = self[depth] if 1 <= depth <= self.ffns else None
        if found is None:
            shallowest = next(iter(self)).depth
            raise PlanError(f"no partition into {depth} FFNs: these limits allow {shallowest} to {self.ffns}")
        return found


def partition_chain(
    matrix: Any,
    *,
    layers: Sequence[Member] | None = None,
    widths: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    limits: Limits | None = None,
    cost: Cost = "sum",
) -> PartitionTable:
    """The least costly partition of one chain of n FFNs into k consecutive groups, for each k from 1 to n.

    Args:
        matrix: `[n, n]`, a tensor, array or lists; only what stands above the diagonal counts.
        layers: what the FFNs are called in the result (default: 0 to n - 1).
        widths: intermediate channels of each FFN, for `max_width`. sizes: bytes of each, for `max_bytes`.
        limits: what a group may be.
        cost: `"sum"` of the entries inside groups, or `"max"`: the largest of them and, among equals, the sum.

    Of partitions that cost the same to the last bit, the one with the shortest last group wins, then the shortest one
    before it, and so on: late FFNs are the ones that fusing hurts most (table 4 of the paper).
    Raises `OptionError` for a matrix with NaN or infinite entries, for shapes that differ, for a limit without data.
    """
    values = _checked_matrix(matrix)
    count = values.shape[0]
    names = list(range(count)) if layers is None else list(layers)
    if len(names) != count or len(set(names)) != count:
        raise OptionError(f"layers: expected {count} different ones, as many as the matrix has rows, got {names}")
    chain = _Chain(names, *_inside(values), _allowed(values, limits or Limits(), widths, sizes))
    if cost == "sum":
        return PartitionTable(chain.least_total(chain.allowed, count), cost)
    if cost == "max":
        return PartitionTable(chain.least_largest(), cost)
    raise OptionError(f"cost: expected 'sum' or 'max', got {cost!r}")


def combine(tables: Sequence[PartitionTable]) -> PartitionTable:
    """The best partition of several chains together, for each number of FFNs that remain in all of them.

    Exact for the tables' cost; under `"max"`, a smaller sum decides among equals, without being always the smallest.
    Ties go to a partition that leaves more FFNs to the chains in front. Raises `OptionError` for no table, and for
    tables of different costs.
    """
    if len({table.cost for table in tables}) != 1:
        raise OptionError("tables: expected at least one, all with the same cost")
    cost = tables[0].cost
    best: list[Partition | None] = [Partition((), 0.0, 0.0)]
    for table in tables:
        longer: list[Partition | None] = [None] * (len(best) + table.ffns)
        for before in reversed([partition for partition in best if partition is not None]):
            for chain in table:
                joined = _joined(before, chain)
                rival = longer[joined.depth]
                if rival is None or _key(joined, cost) < _key(rival, cost):
                    longer[joined.depth] = joined
        best = longer
    return PartitionTable(tuple(best[1:]), cost)


def _joined(one: Partition, other: Partition) -> Partition:
    return Partition(one.groups + other.groups, one.total + other.total, max(one.largest, other.largest))


def _key(partition: Partition, cost: Cost) -> tuple[float, ...]:
    return (partition.total,) if cost == "sum" else (partition.largest, partition.total)


@dataclass(frozen=True, slots=True)
class _Chain:
    """One chain. The tensors are `[n + 1, n + 1]`, indexed by a group's end (exclusive) and its start."""

    names: Sequence[Member]
    total: Tensor
    largest: Tensor
    allowed: Tensor

    def least_total(self, allowed: Tensor, deepest: int) -> tuple[Partition | None, ...]:
        """Least sums into 1 to `deepest` groups."""
        cost = self.total.masked_fill(~allowed, math.inf)
        levels = [_nothing_cut(len(self.names))]
        for _ in range(deepest):
            levels.append((cost + levels[-1]).amin(dim=1))
        return tuple(self._trace(levels, cost, depth) for depth in range(1, deepest + 1))

    def least_largest(self) -> tuple[Partition | None, ...]:
        """Least largest entries, and under each of these bounds the least sum."""
        cost = self.largest.masked_fill(~self.allowed, math.inf)
        level = _nothing_cut(len(self.names))
        bounds = []
        for _ in self.names:
            level = torch.maximum(cost, level).amin(dim=1)
            bounds.append(float(level[-1]))
        found: list[Partition | None] = []
        for depth, bound in enumerate(bounds, 1):
            if depth > len(found):  # the deepest partition under this bound: they are worth one run together
                deepest = max(other for other, value in enumerate(bounds, 1) if value == bound)
                found += self.least_total(self.allowed & (self.largest <= bound), deepest)[len(found) :]
        return tuple(found)

    def _trace(self, levels: Sequence[Tensor], cost: Tensor, depth: int) -> Partition | None:
        """The partition behind `levels[depth]`, from its last group to its first."""
        if math.isinf(float(levels[depth][-1])):
            return None
        end, groups, largest = len(self.names), [], 0.0
        for level in range(depth, 0, -1):
            ways = cost[end] + levels[level - 1]
            start = int((ways == levels[level][end]).nonzero()[-1])
            groups.append(tuple(self.names[start:end]))
            largest = max(largest, float(self.largest[end, start]))
            end = start
        return Partition(tuple(reversed(groups)), float(levels[depth][-1]), largest)


def _nothing_cut(count: int) -> Tensor:
    """Costs of cutting the first 0, 1, ... FFNs into no group at all: `[n + 1]`."""
    return torch.tensor([0.0] + [math.inf] * count, dtype=torch.float64)


def _checked_matrix(matrix: Any) -> Tensor:
    values = torch.as_tensor(matrix, dtype=torch.float64, device="cpu").detach()
    if values.dim() != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise OptionError(f"matrix: expected [n, n] with n at least 1, got {list(values.shape)}")
    broken = (~torch.isfinite(values)).nonzero().tolist()
    if broken:
        row, column = broken[0]
        what = f"{float(values[row, column])} at [{row}, {column}]"
        raise OptionError(f"matrix: {len(broken)} entries are not finite, first {what}; measure it anew")
    return values


def _inside(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and largest of the entries inside each group.

    Only additions, no differences of sums: small entries beside large ones keep their digits.
    """
    upper = values.triu(1)
    sums = upper.flip(0).cumsum(0).flip(0).cumsum(1)  # [start, last]: rows from start on, columns up to last
    largest = upper.flip(0).cummax(0).values.flip(0).cummax(1).values
    return _by_end(sums), _by_end(largest)


def _by_end(found: Tensor) -> Tensor:
    """`[n, n]` by start and last member to `[n + 1, n + 1]` by end and start; what is no group is 0."""
    count = len(found)
    turned = torch.zeros(count + 1, count + 1, dtype=found.dtype)
    turned[1:, :-1] = found.triu().T
    return turned


def _allowed(values: Tensor, limits: Limits, widths: Sequence[int] | None, sizes: Sequence[int] | None) -> Tensor:
    """Which groups may be, `[n + 1, n + 1]` by end and start."""
    count = len(values)
    place = torch.arange(count + 1)
    members = place[:, None] - place
    fits = torch.ones_like(members, dtype=torch.bool)
    if limits.max_members is not None:
        fits &= members <= limits.max_members
    for name, limit, parts, source in (
        ("max_width", limits.max_width, widths, "widths"),
        ("max_bytes", limits.max_bytes, sizes, "sizes"),
    ):
        if limit is None:
            continue
        if parts is None or len(parts) != count or min(parts) < 0:
            raise OptionError(f"{name}: needs {source}, {count} numbers from 0 on, got {parts}")
        sums = torch.tensor([0, *parts], dtype=torch.int64).cumsum(0)
        fits &= sums[:, None] - sums <= limit
    if limits.max_dependency is not None:
        fits &= _inside(values)[1] <= limits.max_dependency
    return (members >= 1) & ((members == 1) | fits)


# --- candidates ---------------------------------------------------------------------------------------


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
        """The FFN depth when these groups are fused."""
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
        if groups is not None and all(_is_allowed(model, group, limits) for group in groups):
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


def _is_allowed(model: DroppedModel, group: Sequence[Member], limits: Limits) -> bool:
    for chain, matrix in zip(model.chains, model.matrices, strict=True):
        if group[0] in chain.members:
            first = chain.members.index(group[0])
            part = slice(first, first + len(group))
            largest = float(torch.triu(matrix[part, part], 1).max())
            return limits.allow(len(group), sum(chain.widths[part]), sum(chain.bytes[part]), largest)
    return False
