"""The search over roads against all plans of a priced meter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, cast

import pytest

from fxfusion.analysis.quality import Quality
from fxfusion.errors import NotFusedError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget
from fxfusion.planning.price import Price, depth_price, latency_price, merged
from fxfusion.planning.roads import ROADS, check_roads
from fxfusion.planning.roads.road import Road, Segment
from fxfusion.planning.scores import RefitMeter, Screen
from fxfusion.planning.windows import WindowSearch
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
    roads: Sequence[str] = tuple(ROADS), price: Price | None = None, refit: Loss | None = None, **meter: Any
) -> WindowSearch:
    refitted = None if refit is None else cast(RefitMeter, PricedRefit(refit))
    screen = Screen(PricedMeter(**meter), tuple(roads), max_window=6)
    return over(screen, price, refitted)


def over(screen: Screen, price: Price | None = None, refitted: RefitMeter | None = None) -> WindowSearch:
    price = price or depth_price(LAYERS)
    return WindowSearch(judge=screen.meter, price=price, screen=screen, refitted=refitted)


def latency_of(plan: FusionPlan) -> float:
    """2 for each attention, 1 for each FFN; a wide block's attentions count as one."""
    moved = sum(len(group) - 1 for group in plan.groups if group.mixers == "wide")
    inner = [layer for group in plan.groups if group.mixers == "wide" for layer in group[1:]]
    spared = moved - sum(layer in plan.dropped_attention for layer in inner)
    return 3.0 * LAYERS - 2.0 * (len(plan.dropped_attention) + len(plan.removed) + spared) - merged(plan)


LATENCY = latency_price(latency_of)


@pytest.mark.parametrize("roads", [("hoist",), ("drop",), ("drop", "hoist"), tuple(ROADS)])
@pytest.mark.parametrize("depth", [5, 3, 1])
def test_at_a_depth_no_plan_loses_less(roads: tuple[str, ...], depth: int) -> None:
    found = search(roads).best_at(depth)
    least = min(loss_of(plan) for plan in all_plans(LAYERS, roads) if LAYERS - merged(plan) <= depth)
    assert found.depth <= depth and found.cost == pytest.approx(least)
    assert found.cost > 0, "and it costs something"


@pytest.mark.parametrize("most", [15.0, 11.0, 7.0])
def test_at_a_latency_no_plan_loses_less(most: float) -> None:
    found = search(price=LATENCY).best_at(most)
    least = min(loss_of(plan) for plan in all_plans(LAYERS) if latency_of(plan) <= most)
    assert latency_of(found.plan) <= most and found.cost == pytest.approx(least)


@pytest.mark.parametrize("most", [4.0, 3.0])
def test_whole_layers_go_where_that_is_best(most: float) -> None:
    """The last layer hardly matters; hoisting costs more."""

    def loss(plan: FusionPlan) -> float:
        return loss_of(plan) - 0.008 * (5 in plan.removed)

    found = search(("hoist", "remove"), loss=loss).best_at(most)
    least = min(loss(plan) for plan in all_plans(LAYERS, ("hoist", "remove")) if LAYERS - merged(plan) <= most)
    assert found.cost == pytest.approx(least) and 5 in found.plan.removed and found.plan.windows
    alone = search(("remove",), loss=loss, refit=lambda plan: loss(plan) / 2).best_at(most)
    assert alone.plan.removed == tuple(range(int(most), LAYERS)) and not alone.plan.groups
    assert alone.cost == pytest.approx(loss(alone.plan) / 2)


def test_more_roads_never_lose_more() -> None:
    tried: set[str] = set()
    for most in (14.0, 12.0, 10.0):
        alone: dict[str, float] = {}
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
    found = over(screen).cheapest(Budget(max_kl=1.0))
    assert len(found.plan.groups) == 1


def test_no_window_at_all_is_a_warning_with_the_reason() -> None:
    with pytest.warns(UserWarning, match=r"no window of layers can be had; layers \[0, 1, 2, 3, 4, 5\] hold no FFN"):
        found = search(("drop", "hoist", "wide"), lacking=range(LAYERS))
        assert found.cheapest(Budget(max_kl=1.0)).plan == FusionPlan()


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


def test_a_new_road_is_a_class_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says itself what it adds to a plan: it drops the attention of layers 2 and 4 alone."""

    class Even(Road):
        name = "even"

        def segment(self, first: int, last: int, mixers: Collection[int]) -> Segment | None:
            return Segment(first, last, self.name) if first == last and first in (2, 4) else None

        def parts(self, segment: Segment, mixers: Collection[int]) -> dict[str, list[Any]]:
            return {"dropped_attention": list(segment.layers)}

    monkeypatch.setitem(ROADS, "even", Even())
    assert check_roads(["even", "hoist"]) == ("hoist", "even")
    found = search(["hoist", "even"], LATENCY)
    best = found.best_at(3.0 * LAYERS - 4.0)
    assert best.plan.dropped_attention == (2, 4) and {one.road for one in found.screen.costs} == {"hoist", "even"}
    assert best.cost < search(["hoist"], LATENCY).best_at(3.0 * LAYERS - 4.0).cost
