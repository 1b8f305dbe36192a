"""Groups in chains against trying all of them; and the candidates at each depth."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfusion.analysis.meter import ChainFacts
from fxfusion.errors import OptionError
from fxfusion.planning.budget import Limits
from fxfusion.planning.partition import Chains, Groups, inside

Cost = Literal["sum", "max"]
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Chain:
    """One chain, and what may be fused in it."""

    matrix: list[list[float]]
    widths: list[int]
    limits: Limits

    @property
    def chains(self) -> Chains:
        return chains_of([self], self.limits)


def chains_of(parts: Sequence[Chain], limits: Limits) -> Chains:
    """Several chains, whose members are numbered on."""
    facts, start = [], 0
    for part in parts:
        members, sizes = tuple(range(start, start + len(part.matrix))), tuple(100 * width for width in part.widths)
        facts.append(ChainFacts(members=members, widths=tuple(part.widths), bytes=sizes, leading=True))
        start += len(members)
    matrices = tuple(torch.tensor(part.matrix, dtype=torch.float64) for part in parts)
    return Chains((), tuple(facts), matrices, start, limits)


def found_by(chains: Chains, cost: Cost) -> dict[int, Groups]:
    """What is found at each depth, where there is something."""
    choose = chains.least_sum if cost == "sum" else chains.least_largest
    found = {depth: choose(depth) for depth in range(1, chains.ffns + 1)}
    return {depth: groups for depth, groups in found.items() if groups is not None}


# --- by trying everything -----------------------------------------------------------------------------


def every_partition(count: int) -> Iterator[Groups]:
    """All ways to cut 0 .. count - 1 into consecutive groups."""
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [at for at, cut in enumerate(cuts, 1) if cut] + [count]
        yield tuple(tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False))


def pairs(matrix: Sequence[Sequence[float]], group: Sequence[int]) -> list[float]:
    return [matrix[i][j] for i, j in itertools.combinations(group, 2)]


def fits(chain: Chain, group: Sequence[int]) -> bool:
    limits = chain.limits
    width = sum(chain.widths[member] for member in group)
    return len(group) == 1 or all(
        limit is None or value <= limit
        for value, limit in (
            (len(group), limits.max_members),
            (width, limits.max_width),
            (100 * width, limits.max_bytes),
            (max(pairs(chain.matrix, group), default=0), limits.max_dependency),
        )
    )


def key_of(parts: Sequence[Chain], groups: Sequence[Groups], cost: Cost) -> tuple[float, ...]:
    """What is to be least: the sum of the entries inside the groups of all chains; or the largest, then the sum."""
    inner = [pairs(part.matrix, group) for part, cut in zip(parts, groups, strict=True) for group in cut]
    total, largest = sum(map(sum, inner)), max((value for values in inner for value in values), default=0)
    return (total,) if cost == "sum" else (max(largest, 0), total)


def by_trying(chain: Chain, cost: Cost) -> dict[int, Groups]:
    """The best groups at each depth; of equals, those with the shortest groups from the end."""
    best: dict[int, tuple[Any, Groups]] = {}
    for partition in every_partition(len(chain.matrix)):
        if all(fits(chain, group) for group in partition):
            key = (*key_of([chain], [partition], cost), tuple(len(group) for group in reversed(partition)))
            if len(partition) not in best or key < best[len(partition)][0]:
                best[len(partition)] = (key, partition)
    return {depth: fused(partition) for depth, (_, partition) in best.items()}


def fused(partition: Groups) -> Groups:
    return tuple(group for group in partition if len(group) > 1)


@st.composite
def chains(draw: st.DrawFn, max_ffns: int = 8) -> Chain:
    """Whole numbers, and few of them: sums are exact, and ties abound."""
    count = draw(st.integers(1, max_ffns))
    entries = st.integers(0, draw(st.sampled_from([0, 1, 3, 1000])))
    matrix = draw(st.lists(st.lists(entries, min_size=count, max_size=count), min_size=count, max_size=count))
    widths = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    limits = Limits(
        max_members=draw(st.none() | st.integers(0, 5)),
        max_width=draw(st.none() | st.integers(0, 15)),
        max_bytes=draw(st.none() | st.integers(0, 1500)),
        max_dependency=draw(st.none() | st.integers(0, 3)),
    )
    return Chain(matrix, widths, limits)


@settings(deadline=None, max_examples=200)
@given(chains(), st.sampled_from(["sum", "max"]))
def test_equal_to_trying_everything(chain: Chain, cost: Cost) -> None:
    assert found_by(chain.chains, cost) == by_trying(chain, cost)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 7).flatmap(
        lambda count: st.lists(
            st.lists(st.floats(-1e-3, 2.0), min_size=count, max_size=count), min_size=count, max_size=count
        )
    )
)
def test_real_numbers(matrix: list[list[float]]) -> None:
    """Here sums round, so the cost is compared; entries may be slightly negative, as cosine distances are."""
    chain = Chain(matrix, [1] * len(matrix), NO_LIMITS)
    found, tried = found_by(chain.chains, "sum"), by_trying(chain, "sum")
    assert found.keys() == tried.keys()
    for depth, groups in found.items():
        mine, least = (key_of([chain], [one], "sum") for one in (groups, tried[depth]))
        assert mine == pytest.approx(least, rel=1e-12, abs=1e-12)


def test_small_entries_beside_large_ones_keep_their_digits() -> None:
    """Differences of prefix sums would lose them."""
    matrix = np.zeros((5, 5))
    matrix[0, 1], matrix[2, 3], matrix[3, 4] = 1e17, 1.0, 2.0
    found = Chain(matrix.tolist(), [1] * 5, NO_LIMITS).chains
    assert found.least_sum(4) == ((1, 2),) and found.least_sum(2) == ((1, 2, 3, 4),)
    assert float(inside(torch.from_numpy(matrix))[0][1, 4]) == 3.0


def test_only_what_is_above_the_diagonal_counts() -> None:
    matrix = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    for one, other in zip(inside(matrix), inside(matrix + torch.ones(6, 6).tril() * 5), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(inside(matrix)[0], inside(matrix + torch.ones(6, 6).triu(1))[0])


def test_of_equals_the_late_ones_stay_alone() -> None:
    zeros = Chain([[0] * 4] * 4, [1] * 4, Limits(max_members=2)).chains
    assert zeros.least_sum(1) is None and zeros.least_sum(2) == ((0, 1), (2, 3))
    assert zeros.least_sum(3) == ((0, 1),) and zeros.least_sum(4) == ()


def test_a_single_ffn_may_exceed_the_limits() -> None:
    found = Chain([[0, 0], [0, 0]], [10, 1], Limits(max_width=5)).chains
    assert found.least_sum(1) is None and found.least_sum(2) == () and found.shallowest == 2


# --- several chains -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(chains(max_ffns=4), min_size=1, max_size=3), chains(max_ffns=2), st.sampled_from(["sum", "max"]))
def test_chains_together(parts: list[Chain], limited: Chain, cost: Cost) -> None:
    parts = [Chain(part.matrix, part.widths, limited.limits) for part in parts]
    best: dict[int, tuple[float, ...]] = {}
    for cuts in itertools.product(*(every_partition(len(part.matrix)) for part in parts)):
        if all(fits(part, group) for part, cut in zip(parts, cuts, strict=True) for group in cut):
            depth, key = sum(map(len, cuts)), key_of(parts, cuts, cost)
            best[depth] = min(best.get(depth, key), key)
    together = chains_of(parts, limited.limits)
    found = found_by(together, cost)
    assert found.keys() == best.keys()
    for depth, groups in found.items():
        assert together.ffns - sum(len(group) - 1 for group in groups) == depth
        assert key_of(parts, _by_chain(parts, groups), cost) == best[depth]


def _by_chain(parts: Sequence[Chain], groups: Groups) -> list[Groups]:
    """The groups of each chain, in its own numbers."""
    found, start = [], 0
    for part in parts:
        end = start + len(part.matrix)
        mine = [group for group in groups if start <= int(group[0]) < end]
        found.append(tuple(tuple(int(member) - start for member in group) for group in mine))
        start = end
    return found


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_no_numbers(value: float) -> None:
    matrix = [[0.0] * 3 for _ in range(3)]
    assert Chain(matrix, [1] * 3, NO_LIMITS).chains.shallowest == 1
    matrix[1][2] = value
    with pytest.raises(OptionError, match=rf"matrix: 1 entries are not finite, first {value} at \[1, 2\]"):
        _ = Chain(matrix, [1] * 3, NO_LIMITS).chains


# --- speed --------------------------------------------------------------------------------------------


def test_a_chain_of_128_takes_two_seconds_at_most() -> None:
    """Processor time: others may run."""
    matrix = torch.rand(128, 128, generator=torch.Generator().manual_seed(1))
    facts = ChainFacts(members=tuple(range(128)), widths=(1,) * 128, bytes=(1,) * 128, leading=True)
    times = []
    for _ in range(3):
        start = time.process_time()
        found = Chains((), (facts,), (matrix,), 128).least_sum(64)
        times.append(time.process_time() - start)
    assert found is not None and sum(len(group) - 1 for group in found) == 64
    assert min(times) < 2.0


# --- candidates ---------------------------------------------------------------------------------------


def chain(first: int, count: int, leading: bool = True, width: int = 10) -> ChainFacts:
    members = tuple(range(first, first + count))
    return ChainFacts(members=members, widths=(width,) * count, bytes=(100,) * count, leading=leading)


def model(*chains: ChainFacts, ffns: int = 12, seed: int = 0, limits: Limits = NO_LIMITS) -> Chains:
    generator = torch.Generator().manual_seed(seed)
    matrices = tuple(torch.rand(len(one.members), len(one.members), generator=generator).triu(1) for one in chains)
    dropped = tuple(layer for one in chains for layer in one.members[int(one.leading) :])
    return Chains(dropped, chains, matrices, ffns, limits)


def test_every_proposal_has_the_depth_and_keeps_neighbours_together() -> None:
    subject = model(chain(1, 5), chain(7, 4))
    for depth in range(subject.shallowest, 13):
        found = list(subject.candidates(depth))
        assert found and len(set(found)) == len(found)
        for groups in found:
            assert subject.ffns - sum(len(group) - 1 for group in groups) == depth
            for group in groups:
                assert list(group) == list(range(group[0], group[-1] + 1)) and len(group) > 1
                assert any(set(group) <= set(one.members) for one in subject.chains)


def test_the_shallowest_fuses_each_chain_into_one() -> None:
    subject = model(chain(1, 5), chain(7, 4))
    assert subject.shallowest == 12 - 4 - 3
    assert list(subject.candidates(5)) == [((1, 2, 3, 4, 5), (7, 8, 9, 10))]
    assert list(subject.candidates(4)) == []
    assert list(subject.candidates(12)) == [()]


def test_without_chains_nothing_can_be_fused() -> None:
    subject = model()
    assert subject.shallowest == 12
    assert list(subject.candidates(12)) == [()] and not list(subject.candidates(11))


@pytest.mark.parametrize(
    ("limits", "largest"),
    [
        (Limits(max_members=3), 3),
        (Limits(max_width=25), 2),
        (Limits(max_bytes=399), 3),
        (Limits(max_dependency=0.0), 1),
    ],
)
def test_limits_bind_every_proposal(limits: Limits, largest: int) -> None:
    subject = model(chain(1, 8), limits=limits)
    for depth in range(1, 13):
        for groups in subject.candidates(depth):
            assert max((len(group) for group in groups), default=1) <= largest
    free = [groups for depth in range(1, 13) for groups in model(chain(1, 8)).candidates(depth)]
    assert max(len(group) for groups in free for group in groups) == 8, "and without limits they do not"


def test_equal_cuts_leave_the_ends_out() -> None:
    subject = model(chain(41, 11), ffns=80)  # layer 41 leads 42-51
    assert subject.equal_cuts(80 - 8, 1, 1) == ((42, 43, 44, 45, 46, 47, 48, 49, 50),)
    assert subject.equal_cuts(80 - 10, 0, 0) == (tuple(range(41, 52)),)
    assert subject.equal_cuts(80 - 10, 1, 1) is None, "so much cannot be had without the ends"
    assert subject.equal_cuts(80 - 7, 1, 1) == ((42, 43, 44, 45), (46, 47, 48, 49, 50))
    later = model(chain(42, 10, leading=False), ffns=80)
    assert later.equal_cuts(80 - 8, 1, 1) == (tuple(range(42, 51)),), "a chain that does not lead keeps its first"
