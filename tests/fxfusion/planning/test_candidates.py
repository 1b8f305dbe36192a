"""Sets of segments against trying all of them."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from fxfusion.planning.candidates import Offer, Proposal, front, propose
from fxfusion.planning.roads.road import Segment
from tests.fxfusion.planning.priced_meter import LAYERS


def offers(seed: int, whole: bool = True) -> list[Offer]:
    draw = random.Random(seed)
    found = []
    for first in range(LAYERS):
        for last in range(first + 1, min(LAYERS, first + 3)):
            saved = float(last - first) if whole else draw.uniform(0.1, 1.0) * (last - first)
            found += [Offer(Segment(first, last, road), draw.random(), saved) for road in ("hoist", "wide")]
    return found


def all_sets(given: list[Offer]) -> list[tuple[float, float, frozenset[Segment]]]:
    """Cost, saved and segments of every set of disjoint offers."""
    found = []
    for size in range(LAYERS // 2 + 1):
        for chosen in combinations(given, size):
            layers = [layer for offer in chosen for layer in offer.segment.layers]
            if len(layers) == len(set(layers)):
                cost, saved = sum(one.cost for one in chosen), sum(one.saved for one in chosen)
                found.append((cost, saved, frozenset(one.segment for one in chosen)))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [1, 3])
def test_each_price_has_its_best_sets(seed: int, keep: int) -> None:
    given = offers(seed)
    found = propose(LAYERS, given, keep)
    for price in range(LAYERS):
        mine = [one.cost for one in found if one.saved == price]
        rivals = sorted(cost for cost, saved, _ in all_sets(given) if saved == price)[:keep]
        assert mine == pytest.approx(rivals)
    assert found[0] == Proposal() and all(_sums_fit(one, given) for one in found)


@pytest.mark.parametrize("seed", range(3))
def test_the_front_over_prices_that_are_no_whole_numbers(seed: int) -> None:
    given = offers(seed, whole=False)
    found = front(propose(LAYERS, given))
    everything = all_sets(given)
    assert len(found) > 3
    for one in found:  # prices are told apart up to 1/256 of the most that can be saved
        step = max(saved for _, saved, _ in everything) / 256
        better = [cost for cost, saved, _ in everything if saved >= one.saved + LAYERS * step]
        assert not better or min(better) >= one.cost - 1e-12
    costs, saved = [one.cost for one in found], [one.saved for one in found]
    assert costs == sorted(costs) and saved == sorted(saved)


def test_without_offers_there_is_the_model_as_it_is() -> None:
    assert propose(3, []) == [Proposal()] and Proposal().segments == ()


def _sums_fit(proposal: Proposal, given: list[Offer]) -> bool:
    by_segment = {offer.segment: offer for offer in given}
    parts = [by_segment[segment] for segment in proposal.segments]
    cost, saved = sum(one.cost for one in parts), sum(one.saved for one in parts)
    ordered = list(proposal.segments) == sorted(proposal.segments)
    return ordered and (cost, saved) == pytest.approx((proposal.cost, proposal.saved))
