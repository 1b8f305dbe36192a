"""candidates: proposals at every depth keep to the limits, and the three ways to cut are all there."""

from __future__ import annotations

import pytest
import torch

from fxfusion.analysis.meter import ChainFacts
from fxfusion.planning.candidates import DroppedModel, candidates, equal_cuts, shallowest
from fxfusion.planning.partition import Limits

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
