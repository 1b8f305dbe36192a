"""Candidates in chains: which FFNs in a row become one, for every number of FFNs that are left.

    chain        42 43 44 45 46 47             M[i, j]: how much FFN j depends on FFN i before it
    groups       (42 43 44) (46 47)            3 FFNs remain; 45 stays as it is

A group costs about the sum of M over its pairs (or the largest entry), and fusing costs nothing between groups: each
reads what the one before wrote. No measure of dependency orders plans perfectly, so for each number of FFNs left the
candidates are of three kinds: even cuts of each chain without its ends (what the paper does by eye), and with them; the
groups with the least sum of M inside; and those with the least largest entry. Which is best is measured, not assumed.
Source: arXiv 2503.18908, section 4 (the dependency matrix; there the groups were picked by eye).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fxfusion.analysis.meter import ChainFacts
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Limits
from fxfusion.planning.candidates import Offer, Proposal, propose
from fxfusion.planning.roads.road import Segment

Groups = tuple[tuple[Member, ...], ...]


@dataclass(frozen=True)
class Chains:
    """A model without some attention: its chains, and the dependency matrix of each, `[members, members]`.

    `ffns`: FFNs of the whole model, in chains or not. Raises `OptionError` for a matrix that is not finite.
    """

    dropped: tuple[int, ...]
    chains: tuple[ChainFacts, ...]
    matrices: tuple[Tensor, ...]
    ffns: int
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for matrix in self.matrices:
            broken = (~torch.isfinite(matrix)).nonzero().tolist()
            if broken:
                row, column = broken[0]
                what = f"{float(matrix[row, column])} at [{row}, {column}]"
                raise OptionError(f"matrix: {len(broken)} entries are not finite, first {what}; measure it anew")

    def plan(self, groups: Sequence[Sequence[Member]], norm: NormMode = "fold") -> FusionPlan:
        return FusionPlan(dropped_attention=self.dropped, groups=tuple(map(tuple, groups)), norm=norm)

    @property
    def shallowest(self) -> int:
        """The least number of FFNs that the limits allow."""
        return self.ffns - int(max(self._least_sum))

    def candidates(self, depth: int) -> Iterator[Groups]:
        """Groups that leave `depth` FFNs in the whole model, the plainest first; none twice."""
        for groups in dict.fromkeys(self._candidates(depth)):
            if self.ffns - sum(len(group) - 1 for group in groups) == depth:
                yield groups

    def _candidates(self, depth: int) -> Iterator[Groups]:
        if depth == self.ffns:
            yield ()
        for ends in ((1, 1), (0, 1), (1, 0), (0, 0)):
            groups = self.equal_cuts(depth, *ends)
            if groups is not None and all(group in self._allowed for group in groups):
                yield groups
        for found in (self.least_sum(depth), self.least_largest(depth)):
            if found is not None:
                yield found

    def least_sum(self, depth: int) -> Groups | None:
        """The groups with the least sum of dependencies inside them; None where the limits allow none."""
        return self._groups(self._least_sum.get(self.ffns - depth))

    def least_largest(self, depth: int) -> Groups | None:
        """Of the groups with the least largest dependency, those with the least sum."""
        bound = self._bounds.get(self.ffns - depth)
        if bound is None:
            return None
        offers = [offer for offer, largest in self._offers if largest <= bound.cost]
        return self._groups(_by_saved(propose(len(self.members), offers)).get(self.ffns - depth))

    def equal_cuts(self, depth: int, leading: int, last: int) -> Groups | None:
        """Each chain without its leading member (`leading` 1) and its last (`last` 1), cut into groups of even length.

        Groups go to the chains so that the longest group is as short as the depth allows. None if no cut gives the
        depth.
        """
        runs = []
        for chain in self.chains:
            start = leading if chain.leading else 0
            run = chain.members[start : len(chain.members) - last]
            if len(run) > 1:
                runs.append(run)
        if not runs:
            return None
        pieces = [1] * len(runs)
        merged = self.ffns - depth
        while sum(len(run) - piece for run, piece in zip(runs, pieces, strict=True)) > merged:
            longest = max(range(len(runs)), key=lambda index: (len(runs[index]) / pieces[index], index))
            pieces[longest] += 1
        if sum(len(run) - piece for run, piece in zip(runs, pieces, strict=True)) != merged:
            return None
        cut = [group for run, piece in zip(runs, pieces, strict=True) for group in _evenly(run, piece)]
        return tuple(group for group in cut if len(group) > 1)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Those of all chains; segments are places in here."""
        return tuple(member for chain in self.chains for member in chain.members)

    def _groups(self, proposal: Proposal | None) -> Groups | None:
        if proposal is None:
            return None
        return tuple(self.members[segment.first : segment.last + 1] for segment in proposal.segments)

    @cached_property
    def _offers(self) -> list[tuple[Offer, float]]:
        """Every group that the limits allow, with the sum of the entries inside it, and the largest of them."""
        found = []
        offset = 0
        for chain, matrix in zip(self.chains, self.matrices, strict=True):
            sums, largest = (values.tolist() for values in inside(matrix))
            for last in range(1, len(chain.members)):
                width, size = chain.widths[last], chain.bytes[last]
                for first in range(last - 1, -1, -1):
                    width, size = width + chain.widths[first], size + chain.bytes[first]
                    if self.limits.allow(last + 1 - first, width, size, largest[first][last]):
                        segment = Segment(offset + first, offset + last, "drop")
                        found.append((Offer(segment, sums[first][last], last - first), largest[first][last]))
            offset += len(chain.members)
        return found

    @cached_property
    def _allowed(self) -> frozenset[tuple[Member, ...]]:
        return frozenset(self.members[one.segment.first : one.segment.last + 1] for one, _ in self._offers)

    @cached_property
    def _least_sum(self) -> dict[float, Proposal]:
        """By how much they lower the depth, the groups with the least sum inside."""
        return _by_saved(propose(len(self.members), [offer for offer, _ in self._offers]))

    @cached_property
    def _bounds(self) -> dict[float, Proposal]:
        """The same with the least largest entry."""
        offers = [replace(offer, cost=largest) for offer, largest in self._offers]
        return _by_saved(propose(len(self.members), offers, join=max))


def inside(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and largest of the entries above the diagonal inside each group, `[n, n]` by its first and last member.

    Only additions, no differences of sums: small entries beside large ones keep their digits.
    """
    upper = matrix.detach().to("cpu", torch.float64).triu(1)
    sums = upper.flip(0).cumsum(0).flip(0).cumsum(1)  # [start, last]: rows from start on, columns up to last
    return sums, upper.flip(0).cummax(0).values.flip(0).cummax(1).values


def _by_saved(proposals: Sequence[Proposal]) -> dict[float, Proposal]:
    return {one.saved: one for one in proposals}


def _evenly(run: Sequence[Member], pieces: int) -> list[tuple[Member, ...]]:
    bounds = [round(index * len(run) / pieces) for index in range(pieces + 1)]
    return [tuple(run[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
