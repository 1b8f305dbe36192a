"""Cutting runs of FFNs into groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfusion.cost.cuts import even, fill, fusable_runs, fused
from fxfusion.cost.sublayers import arrange
from fxfusion.plan.policy import PRESETS, FusionPolicy
from tests.fxfusion.cost.test_sublayers import shown, table

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("text", "policy", "expected"),
    [
        ("A4 4 4 4 A4", PRESETS["paper"], [(2, 3)]),
        ("A4 4 4 4 A4", FusionPolicy(), [(1, 2, 3, 4)]),
        ("A4 4 - 4 A4 4", FusionPolicy(keep_last=1), [(1, 2)]),  # the last run keeps one, too few
        ("A 4 4 4", PRESETS["paper"], [(1, 2)]),  # a layer without an FFN: none leads
        ("4 4 A4", PRESETS["maximal"], [(0, 1)]),
    ],
)
def test_runs(text: str, policy: FusionPolicy, expected: list[tuple[int, ...]]) -> None:
    assert list(fusable_runs(arrange(table(text)), policy)) == expected


def test_filled_and_even() -> None:
    run = tuple(range(10, 17))
    assert fill(run, [4] * 7, 12) == ((10, 11, 12), (13, 14, 15), (16,))
    assert even(run, [4] * 7, 3) == ((10, 11, 12), (13, 14, 15), (16,))
    assert even(run, [9, 1, 1, 1, 1, 1, 4], 2) == ((10,), (11, 12, 13, 14, 15, 16))
    assert fill((1, 2), [5, 5], 3) == ((1,), (2,))


@given(sizes=SIZES, count=st.integers(1, 5))
def test_an_even_cut_is_a_cut_and_none_is_narrower(sizes: list[int], count: int) -> None:
    run = tuple(range(len(sizes)))
    cut = even(run, sizes, count)
    assert sum(cut, ()) == run and len(cut) <= count
    widest = max(sum(sizes[place] for place in group) for group in cut)
    assert widest >= max(sizes)
    assert len(fill(run, sizes, widest - 1)) > count or widest == max(sizes)


def test_fused_steps() -> None:
    step = arrange(table("A4 4 4 4 A4"), unfuse={3: 2})
    after = fused(step, [((2,), (3, 4, 5))])
    assert shown(step) == "A 4 4 4 2 2 A 4" and shown(after) == "A 4 4 [8] A 4"
    assert after.ffns[2].layers == (2, 3) and after.ffns[2].members == 3
