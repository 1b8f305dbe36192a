"""Least costly partitions against trying all of them; and the candidates at each depth."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfusion.analysis.meter import ChainFacts
from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Limits
from fxfusion.planning.candidates import (
    Cost,
    DroppedModel,
    Partition,
    PartitionTable,
    candidates,
    combine,
    equal_cuts,
    partition_chain,
    shallowest,
)

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Chain:
    """What `partition_chain` is asked about."""

    matrix: list[list[float]]
    widths: list[int]
    limits: Limits

    def table(self, cost: Cost = "sum") -> PartitionTable:
        return partition_chain(self.matrix, widths=self.widths, sizes=self.sizes, limits=self.limits, cost=cost)

    @property
    def sizes(self) -> list[int]:
        return [100 * width for width in self.widths]


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


def by_trying(chain: Chain, cost: Cost) -> list[Partition | None]:
    """The best partition into each number of groups; of equals, the one with the shortest groups from the end."""
    count = len(chain.matrix)
    groups = {(s, e): tuple(range(s, e)) for s in range(count) for e in range(s + 1, count + 1)}
    allowed = {group: fits(chain, group) for group in groups.values()}
    inside = {group: pairs(chain.matrix, group) for group in groups.values()}
    totals = {group: sum(values) for group, values in inside.items()}
    peaks = {group: max(values, default=0) for group, values in inside.items()}
    best: dict[int, tuple[Any, Partition]] = {}
    for partition in every_partition(count):
        if not all(allowed[group] for group in partition):
            continue
        total, largest = sum(totals[group] for group in partition), max(peaks[group] for group in partition)
        lengths = tuple(len(group) for group in reversed(partition))
        key = (total, lengths) if cost == "sum" else (largest, total, lengths)
        if len(partition) not in best or key < best[len(partition)][0]:
            best[len(partition)] = (key, Partition(partition, float(total), float(largest)))
    return [best[depth][1] if depth in best else None for depth in range(1, count + 1)]


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
    assert list(chain.table(cost).partitions) == by_trying(chain, cost)


@pytest.mark.parametrize("cost", ["sum", "max"])
@pytest.mark.parametrize("kind", ["random", "ties", "constant", "band"])
def test_equal_to_trying_everything_up_to_14(kind: str, cost: Cost) -> None:
    for count in (1, 2, 3, 11, 14):
        random = np.random.default_rng(count)
        matrix = {
            "random": random.integers(0, 10**6, (count, count)),
            "ties": random.integers(0, 3, (count, count)),
            "constant": np.ones((count, count), dtype=int),
            "band": np.fromfunction(lambda i, j: np.maximum(0, 8 - abs(i - j)), (count, count)).astype(int),
        }[kind]
        chain = Chain(matrix.tolist(), random.integers(1, 9, count).tolist(), Limits(max_width=30))
        assert list(chain.table(cost).partitions) == by_trying(chain, cost)


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
    tried = by_trying(Chain(matrix, [1] * len(matrix), Limits()), "sum")
    for found, best in zip(partition_chain(matrix).partitions, tried, strict=True):
        assert found is not None and best is not None
        assert found.total == pytest.approx(best.total, rel=1e-12, abs=1e-12)
        assert found.total == pytest.approx(sum(sum(pairs(matrix, group)) for group in found.groups), abs=1e-12)
        assert found.largest == max(0.0, *(max(pairs(matrix, group), default=0.0) for group in found.groups))


def test_small_entries_beside_large_ones_keep_their_digits() -> None:
    """Differences of prefix sums would lose them."""
    matrix = np.zeros((5, 5))
    matrix[0, 1], matrix[2, 3], matrix[3, 4] = 1e17, 1.0, 2.0
    found = partition_chain(matrix).at(4)
    assert found.groups == ((0,), (1, 2), (3,), (4,)) and found.total == 0
    found = partition_chain(matrix).at(2)
    assert found.groups == ((0,), (1, 2, 3, 4)) and found.total == 3.0


# --- what the table says ------------------------------------------------------------------------------


def test_only_what_is_above_the_diagonal_counts() -> None:
    matrix = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    below = matrix + torch.ones(6, 6).tril() * 5
    assert partition_chain(below) == partition_chain(matrix)
    assert partition_chain(matrix + torch.ones(6, 6).triu(1)) != partition_chain(matrix)


def test_any_kind_of_matrix() -> None:
    matrix = [[0, 1, 4], [0, 0, 2], [0, 0, 0]]
    tensor = torch.tensor(matrix, dtype=torch.bfloat16, requires_grad=False)
    gradient = torch.tensor(matrix, dtype=torch.float32, requires_grad=True)
    tables = [partition_chain(given) for given in (matrix, np.array(matrix), tensor, gradient)]
    assert tables == [tables[0]] * 4
    assert [partition.total for partition in tables[0]] == [7, 1, 0]


def test_names_and_groups() -> None:
    table = partition_chain(torch.zeros(4, 4), layers=[42, "a.b", 44, 45], limits=Limits(max_members=2))
    assert table.ffns == 4 and table[1] is None
    found = table.at(2)
    assert found.groups == ((42, "a.b"), (44, 45)) and found.depth == 2 and found.fused == found.groups
    assert FusionPlan(groups=found.fused).groups == found.groups
    assert table.at(3).groups == ((42, "a.b"), (44,), (45,)), "of equals, the late ones stay alone"
    assert table.at(4).fused == ()
    assert [partition.depth for partition in table] == [2, 3, 4]


def test_a_single_ffn_may_exceed_the_limits() -> None:
    table = partition_chain([[0, 0], [0, 0]], widths=[10, 1], limits=Limits(max_width=5))
    assert table[1] is None and table.at(2).groups == ((0,), (1,))
    assert partition_chain([[0]], limits=Limits(max_members=0)).at(1).groups == ((0,),)


def test_what_cannot_be_had_says_what_can() -> None:
    table = partition_chain(torch.zeros(7, 7), limits=Limits(max_members=3))
    with pytest.raises(PlanError, match="no partition into 2 FFNs: these limits allow 3 to 7"):
        table.at(2)
    for depth in (0, 8):
        with pytest.raises(PlanError, match=f"no partition into {depth} FFNs: these limits allow 3 to 7"):
            table.at(depth)
        with pytest.raises(IndexError, match=f"depth {depth} is not in 1 to 7"):
            table[depth]
    assert table[2] is None and table[3] is not None


# --- several chains -----------------------------------------------------------------------------------


def combined_by_trying(tables: Sequence[PartitionTable], cost: Cost) -> dict[int, float]:
    """Least cost of each total depth over every choice of one partition per chain."""
    best: dict[int, float] = {}
    for choice in itertools.product(*tables):
        depth = sum(partition.depth for partition in choice)
        costs = [partition.total if cost == "sum" else partition.largest for partition in choice]
        best[depth] = min(best.get(depth, math.inf), sum(costs) if cost == "sum" else max(costs))
    return best


@settings(deadline=None, max_examples=60)
@given(st.lists(chains(max_ffns=5), min_size=1, max_size=3), st.sampled_from(["sum", "max"]))
def test_chains_together(given_chains: list[Chain], cost: Cost) -> None:
    tables = [chain.table(cost) for chain in given_chains]
    together, best = combine(tables), combined_by_trying(tables, cost)
    assert together.ffns == sum(table.ffns for table in tables)
    for depth in range(1, together.ffns + 1):
        found = together[depth]
        assert (found is not None) == (depth in best)
        if found is not None:
            assert found.depth == depth
            assert (found.total if cost == "sum" else found.largest) == best[depth]
    assert list(combine(tables).partitions) == list(together.partitions)


def test_chains_together_are_as_good_as_one_search_over_all_cuts() -> None:
    """The same as one chain with a wall where the second begins."""
    random = np.random.default_rng(5)
    one, two = random.integers(0, 50, (5, 5)), random.integers(0, 50, (6, 6))
    wall = np.full((11, 11), 10**6)
    wall[:5, :5], wall[5:, 5:] = one, two
    walled = partition_chain(wall, limits=Limits(max_dependency=50))
    together = combine([partition_chain(one), partition_chain(two, layers=range(5, 11))])
    for depth in range(1, 12):
        found, other = together[depth], walled[depth]
        assert (found is None) == (other is None)
        if found is not None and other is not None:
            assert found.total == other.total
            assert [member for group in found.groups for member in group] == list(range(11))
    assert together[1] is None and together[2] is not None


def test_chains_together_by_their_largest_entry() -> None:
    ones, twos = torch.ones(3, 3), torch.full((3, 3), 2.0)
    tables = [partition_chain(matrix, cost="max") for matrix in (ones, twos)]
    assert [partition.largest for partition in combine(tables)] == [2, 2, 1, 1, 0]
    assert [partition.total for partition in combine(tables)] == [9, 5, 3, 1, 0]


def test_ties_between_chains_fuse_the_later_one() -> None:
    zeros = [partition_chain(torch.zeros(3, 3), layers=layers) for layers in ([0, 1, 2], [5, 6, 7])]
    assert combine(zeros).at(4).groups == ((0,), (1,), (2,), (5, 6, 7))
    assert combine(zeros).at(2).groups == ((0, 1, 2), (5, 6, 7))


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_no_numbers(value: float) -> None:
    matrix = torch.zeros(3, 3)
    assert partition_chain(matrix).ffns == 3
    matrix[1, 2] = value
    with pytest.raises(OptionError, match=rf"matrix: 1 entries are not finite, first {value} at \[1, 2\]"):
        partition_chain(matrix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": [[0, 1]]}, r"matrix: expected \[n, n\] with n at least 1, got \[1, 2\]"),
        ({"matrix": [1, 2]}, r"matrix: expected \[n, n\]"),
        ({"matrix": torch.zeros(0, 0)}, r"got \[0, 0\]"),
        ({"layers": [1]}, "layers: expected 2 different ones, as many as the matrix has rows"),
        ({"layers": [1, 1]}, "layers: expected 2 different ones"),
        ({"limits": Limits(max_width=3)}, "max_width: needs widths, 2 numbers from 0 on, got None"),
        ({"limits": Limits(max_bytes=3)}, "max_bytes: needs sizes, 2 numbers from 0 on, got None"),
        ({"limits": Limits(max_bytes=3), "sizes": [1]}, r"max_bytes: needs sizes, 2 numbers from 0 on, got \[1\]"),
        ({"limits": Limits(max_width=3), "widths": [1, -1]}, "max_width: needs widths, 2 numbers from 0 on"),
        ({"cost": "mean"}, "cost: expected 'sum' or 'max', got 'mean'"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        partition_chain(**{"matrix": [[0, 1], [0, 0]]} | changes)


def test_bad_limits_and_tables() -> None:
    for name, value in (("max_members", -1), ("max_dependency", math.nan), ("max_bytes", -0.5)):
        with pytest.raises(OptionError, match=f"{name}: expected a number from 0 on, got {value}"):
            Limits(**{name: value})
    table = partition_chain([[0]])
    for tables in ([], [table, partition_chain([[0]], cost="max")]):
        with pytest.raises(OptionError, match="tables: expected at least one, all with the same cost"):
            combine(tables)


# --- speed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["sum", "max"])
def test_a_chain_of_128_takes_under_a_second(cost: Cost) -> None:
    """0.15 s and 0.26 s on one core of the machine that this was written on. Processor time: others may run."""
    matrix = torch.rand(128, 128, generator=torch.Generator().manual_seed(1))
    times = []
    for _ in range(3):
        start = time.process_time()
        table = partition_chain(matrix, cost=cost)
        times.append(time.process_time() - start)
    assert len(list(table)) == 128
    assert min(times) < 1.0
    totals = [partition.total if cost == "sum" else partition.largest for partition in table]
    assert totals == sorted(totals, reverse=True), "with one more FFN the cost cannot rise"


NO_LIMITS = Limits()


def chain(first: int, count: int, leading: bool = True, width: int = 10) -> ChainFacts:
    members = tuple(range(first, first + count))
    return ChainFacts(members=members, widths=(width,) * count, bytes=(100,) * count, leading=leading)


def model(*chains: ChainFacts, ffns: int = 12, seed: int = 0) -> DroppedModel:
    generator = torch.Generator().manual_seed(seed)
    matrices = tuple(torch.rand(len(one.members), len(one.members), generator=generator).triu(1) for one in chains)
    dropped = tuple(layer for one in chains for layer in one.members[int(one.leading) :])
    return DroppedModel(dropped, chains, matrices, ffns)


def test_every_proposal_has_the_depth_and_keeps_neighbours_together() -> None:
    subject = model(chain(1, 5), chain(7, 4))
    for depth in range(shallowest(subject, NO_LIMITS), 13):
        found = list(candidates(subject, NO_LIMITS, depth))
        assert found and len(set(found)) == len(found)
        for groups in found:
            assert subject.depth(groups) == depth
            for group in groups:
                assert list(group) == list(range(group[0], group[-1] + 1)) and len(group) > 1
                assert any(set(group) <= set(one.members) for one in subject.chains)


def test_the_shallowest_fuses_each_chain_into_one() -> None:
    subject = model(chain(1, 5), chain(7, 4))
    assert shallowest(subject, NO_LIMITS) == 12 - 4 - 3
    assert list(candidates(subject, NO_LIMITS, 5)) == [((1, 2, 3, 4, 5), (7, 8, 9, 10))]
    assert list(candidates(subject, NO_LIMITS, 4)) == []
    assert list(candidates(subject, NO_LIMITS, 12)) == [()]


def test_without_chains_nothing_can_be_fused() -> None:
    subject = model()
    assert shallowest(subject, NO_LIMITS) == 12
    assert list(candidates(subject, NO_LIMITS, 12)) == [()] and not list(candidates(subject, NO_LIMITS, 11))


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
    subject = model(chain(1, 8))
    for depth in range(1, 13):
        for groups in candidates(subject, limits, depth):
            assert max((len(group) for group in groups), default=1) <= largest
    free = [groups for depth in range(1, 13) for groups in candidates(subject, NO_LIMITS, depth)]
    assert max(len(group) for groups in free for group in groups) == 8, "and without limits they do not"


def test_equal_cuts_leave_the_ends_out() -> None:
    subject = model(chain(41, 11), ffns=80)  # layer 41 leads 42-51
    assert equal_cuts(subject, 80 - 8, 1, 1) == ((42, 43, 44, 45, 46, 47, 48, 49, 50),)
    assert equal_cuts(subject, 80 - 10, 0, 0) == (tuple(range(41, 52)),)
    assert equal_cuts(subject, 80 - 10, 1, 1) is None, "so much cannot be had without the ends"
    assert equal_cuts(subject, 80 - 7, 1, 1) == ((42, 43, 44, 45), (46, 47, 48, 49, 50))
    later = model(chain(42, 10, leading=False), ffns=80)
    assert equal_cuts(later, 80 - 8, 1, 1) == (tuple(range(42, 51)),), "a chain that does not lead keeps its first"


def test_bytes_are_those_of_the_fused_members() -> None:
    subject = model(chain(1, 5))
    assert subject.bytes_of([[1, 2], [4, 5]]) == 400 and subject.bytes_of([]) == 0
