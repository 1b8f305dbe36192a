"""Proposals against trying all of them, and the search against all plans of a priced meter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any, cast

import pytest

from fxfusion.analysis.quality import Quality
from fxfusion.errors import NotFusedError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget
from fxfusion.planning.price import Price, depth_price, latency_price, merged
from fxfusion.planning.scores import ROADS, RefitMeter, Road, Screen, Segment
from fxfusion.planning.windows import Offer, Proposal, RoadSearch, front, propose
from tests.fxfusion.planning.priced_meter import LAYERS, Loss, PricedMeter, all_plans, loss_of, quality_of


class PricedRefit:
    """A refit whose result is set by hand. `asked`: the plans that were refitted."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.asked = loss, cast(list[FusionPlan], [])

    def knows(self, plan: FusionPlan) -> bool:
        return plan in self.asked

    def quality(self, plan: FusionPlan) -> Quality:
        self.asked.append(plan)
        return quality_of(self.loss(plan))


def search(
    roads: Sequence[Road] = ROADS, price: Price | None = None, refit: Loss | None = None, **meter: Any
) -> RoadSearch:
    refitted = None if refit is None else cast(RefitMeter, PricedRefit(refit))
    screen = Screen(PricedMeter(**meter), tuple(roads), max_window=6)
    return RoadSearch(screen, price or depth_price(LAYERS), screen.meter, refitted)


def latency_of(plan: FusionPlan) -> float:
    """2 for each attention, 1 for each FFN; a wide block's attentions count as one."""
    moved = sum(len(group) - 1 for group in plan.groups if group.mixers == "wide")
    inner = [layer for group in plan.groups if group.mixers == "wide" for layer in group[1:]]
    spared = moved - sum(layer in plan.dropped_attention for layer in inner)
    return 3.0 * LAYERS - 2.0 * (len(plan.dropped_attention) + spared) - merged(plan)


LATENCY = latency_price(latency_of)


@pytest.mark.parametrize("roads", [("hoist",), ("drop",), ("drop", "hoist"), ROADS])
@pytest.mark.parametrize("depth", [5, 3, 1])
def test_at_a_depth_no_plan_loses_less(roads: tuple[Road, ...], depth: int) -> None:
    found = search(roads).best_at(depth)
    least = min(loss_of(plan) for plan in all_plans(LAYERS, roads) if LAYERS - merged(plan) <= depth)
    assert found.depth <= depth and found.cost == pytest.approx(least)
    assert found.cost > 0, "and it costs something"


@pytest.mark.parametrize("most", [15.0, 11.0, 7.0])
def test_at_a_latency_no_plan_loses_less(most: float) -> None:
    found = search(price=LATENCY).best_at(most)
    least = min(loss_of(plan) for plan in all_plans(LAYERS) if latency_of(plan) <= most)
    assert latency_of(found.plan) <= most and found.cost == pytest.approx(least)


def test_more_roads_never_lose_more() -> None:
    tried: set[Road] = set()
    for most in (14.0, 12.0, 10.0):
        alone: dict[Road, float] = {}
        for road in ROADS:
            with suppress(PlanError):  # moving attention alone does not get that far
                alone[road] = search([road], LATENCY).best_at(most).cost
        assert search(price=LATENCY).best_at(most).cost <= min(alone.values()) + 1e-12
        tried |= alone.keys()
    assert tried == set(ROADS)


def test_a_run_without_attention_belongs_to_every_road() -> None:
    """Attention of layers 3 and 4 is gone already: 2, 3 and 4 become one, whatever road the others take."""
    mixed, alone = (search(roads, mixers=(0, 1, 2, 5)) for roads in (("drop", "hoist"), ("hoist",)))
    for one in (mixed, alone):
        one.best_at(LAYERS)
    assert max(one.saved for one in mixed.on_one_road[1]) == max(one.saved for one in alone.proposals) >= 2


def test_windows_that_cannot_be_had_together_are_taken_one_by_one() -> None:
    """One price whose plans cannot be had does not end the search."""

    class Apart(PricedMeter):
        def quality(self, plan: FusionPlan) -> Quality:
            if len(plan.groups) > 1:
                raise NotFusedError("the plan does not fit this model: not both")
            return super().quality(plan)

    screen = Screen(Apart(), ("hoist",), max_window=2)
    found = RoadSearch(screen, depth_price(LAYERS), screen.meter).cheapest(Budget(max_kl=1.0))
    assert len(found.plan.groups) == 1


def test_no_window_at_all_is_a_warning_with_the_reason() -> None:
    with pytest.warns(UserWarning, match=r"no window of layers can be had; layers \[0, 1, 2, 3, 4, 5\] hold no FFN"):
        assert search(lacking=range(LAYERS)).cheapest(Budget(max_kl=1.0)).plan == FusionPlan()


@pytest.mark.parametrize("bound", [0.002, 0.01, 0.05])
def test_within_a_quality_no_plan_is_cheaper(bound: float) -> None:
    found = search(price=LATENCY).cheapest(Budget(max_kl=bound))
    least = min(latency_of(plan) for plan in all_plans(LAYERS) if loss_of(plan) <= bound)
    assert found.cost <= bound and latency_of(found.plan) <= least + 1.0, "up to what additive costs cannot tell"
    assert latency_of(found.plan) < 3.0 * LAYERS


def test_with_no_room_nothing_is_done() -> None:
    assert search().cheapest(Budget(max_kl=0.0)).plan == FusionPlan()


def test_the_refit_decides() -> None:
    """As it is, hoisting 4-5 is best; after a refit, 2-3 is. Few plans are refitted."""

    def after(plan: FusionPlan) -> float:
        return loss_of(plan) * (0.1 if any(set(group) == {2, 3} for group in plan.groups) else 0.9)

    as_is, judged = search(["hoist"]), search(["hoist"], refit=after)
    assert [list(group) for group in as_is.best_at(5).plan.groups] == [[4, 5]]
    found = judged.best_at(5)
    assert [list(group) for group in found.plan.groups] in ([[2, 3]], [[2, 3], [4, 5]])
    assert found.cost < loss_of(found.plan)
    assert len(judged.refitted.asked) < 8  # type: ignore[union-attr]


def test_windows_that_do_not_add_up_are_measured_together() -> None:
    """Neighbouring windows that hurt each other: their sum alone would choose them."""

    def loss(plan: FusionPlan) -> float:
        starts = {int(group[0]) for group in plan.groups}
        return loss_of(plan) + 0.5 * ({2, 4} <= starts)

    found = search(["hoist"], loss=loss).best_at(4)
    assert not {2, 4} <= {int(group[0]) for group in found.plan.groups} and found.cost < 0.1


def test_roads_are_mixed_only_where_that_is_surely_better() -> None:
    """Dropping the last attention costs next to nothing: so a mixed plan is best, if there is no noise."""

    def loss(plan: FusionPlan) -> float:
        return loss_of(plan) - (0.03 / 6 - 1e-4) * (5 in plan.dropped_attention)

    sure, unsure = (search(["drop", "hoist"], loss=loss, noise=noise).best_at(3) for noise in (0.0, 0.1))
    assert sure.plan.dropped_attention and sure.plan.windows
    assert not (unsure.plan.dropped_attention and unsure.plan.windows)
    assert sure.cost < unsure.cost < sure.cost + 0.1


def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(PlanError, match="no plan reaches 0 FFNs; the windows that can be had reach 1 FFNs"):
        search(["hoist"]).best_at(0)
    pairs = [(layer, layer + 1) for layer in range(LAYERS - 1)]
    with pytest.raises(PlanError, match=r"5 were refused, such as: .*window \[0, 1\]: it cannot move"):
        search(["hoist"], refused=pairs).best_at(4)
    with pytest.raises(PlanError, match=r"layers \[0, 5\] hold no FFN that can be fused"):
        search(["hoist"], lacking=[0, 5]).best_at(2)
    assert search(["drop", "hoist"], refused=pairs).best_at(4).plan.dropped_attention, "dropping still can"


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
