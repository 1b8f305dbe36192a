"""Where the channels of each member stand in a wide FFN: once each, and a slice of every member in each part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxfusion.models.ffn_surgery.group_recipe import Run, spread


def owners(widths: list[int], shards: int) -> Tensor:
    """Whose each channel of the wide FFN is, `[sum of widths]`; -1 where it is nobody's."""
    found = torch.full((sum(widths),), -1)
    for member, runs in enumerate(spread(widths, shards)):
        for run in runs:
            assert bool((found[run.wide : run.wide + run.length] == -1).all()), "two members on one channel"
            found[run.wide : run.wide + run.length] = member
    return found


def test_one_member_after_the_other() -> None:
    assert spread([3, 2], 1) == [(Run(0, 0, 3),), (Run(3, 0, 2),)]


def test_each_half_holds_half_of_every_member() -> None:
    assert spread([4, 2], 2) == [(Run(0, 0, 2), Run(3, 2, 2)), (Run(2, 0, 1), Run(5, 1, 1))]


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_widths_that_do_not_divide_give_parts_that_differ_by_no_more_than_rounding(shards: int) -> None:
    widths = [7, 13, 5]
    parts = owners(widths, shards).chunk(shards)
    for part in parts[:-1]:  # the last one is shorter, as the whole does not divide
        for member, width in enumerate(widths):
            assert abs(int((part == member).sum()) - width * len(part) / sum(widths)) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 6))
def test_every_channel_stands_somewhere_once_and_in_order(widths: list[int], shards: int) -> None:
    assert bool((owners(widths, shards) >= 0).all())
    for width, runs in zip(widths, spread(widths, shards), strict=True):
        own = [channel for run in runs for channel in range(run.own, run.own + run.length)]
        assert own == list(range(width))
        assert len(runs) <= shards


@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(2, 4))
def test_widths_that_divide_are_cut_evenly(halves: list[int], shards: int) -> None:
    widths = [half * shards for half in halves]
    for part in owners(widths, shards).chunk(shards):
        assert torch.bincount(part, minlength=len(widths)).tolist() == halves


@given(st.lists(st.integers(8, 40), min_size=2, max_size=4), st.integers(2, 4))
def test_each_part_has_a_slice_of_every_member(widths: list[int], shards: int) -> None:
    whole = sum(widths)
    for part in owners(widths, shards).chunk(shards):
        if len(part) * shards >= whole:  # not the shorter last one
            assert set(part.tolist()) == set(range(len(widths)))
