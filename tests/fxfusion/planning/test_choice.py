"""The loops of the engine, on a search whose plans and losses are set by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from fxfusion.errors import PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget, Measured
from fxfusion.planning.choice import Rung, Search, Start
from fxfusion.planning.price import depth_price
from tests.fxfusion.planning.priced_meter import LAYERS, PricedMeter

PER_MERGE, PER_DROP = 0.01, 0.03


@dataclass(slots=True, kw_only=True)
class Toy(Search):
    """Dropping the last n attentions lets their FFNs become one with the one before; a merge costs `PER_MERGE`.

    `expected`: the loss that is expected of each merge; 0: nothing is. `tried`: starts and prices, in order.
    """

    expected: float = 0.0
    tried: list[tuple[int, float]] = field(default_factory=list)

    @property
    def intact(self) -> Measured:
        return self.measure(FusionPlan())

    def rounds(self, most: float, budget: Budget) -> Iterable[Sequence[Start]]:
        return [[tuple(range(LAYERS - number, LAYERS))] for number in range(int(LAYERS - most), LAYERS)]

    def starts_within(self, budget: Budget) -> Sequence[Start]:
        return [tuple(range(LAYERS - number, LAYERS)) for number in (5, 3, 0)]

    def ladder(self, start: Start) -> list[Rung]:
        return [(float(LAYERS - merges), merges * self.expected) for merges in range(len(start) + 1)]

    def try_at(self, start: Start, most: float, budget: Budget, on_the_way: bool = False) -> Measured | None:
        self.tried.append((len(start), most))
        merges = LAYERS - int(most)
        if merges > len(start):
            return None
        groups = [range(LAYERS - merges - 1, LAYERS)] if merges else []
        return self.measure(FusionPlan(dropped_attention=start, groups=groups))

    def least_price(self, start: Start) -> float:
        return LAYERS - len(start)

    def why_none(self, starts: Sequence[Start], most: float | None) -> str:
        return f"nothing from {len(starts)} starts"

    def every_depth(self, drops: Sequence[int] | None) -> Iterator[tuple[Start, int]]:
        yield from ()


def toy(expected: float = 0.0) -> Toy:
    meter = PricedMeter(lambda plan: PER_DROP * len(plan.dropped_attention) + PER_MERGE * merged_of(plan))
    return Toy(judge=meter, price=depth_price(LAYERS), expected=expected)


def merged_of(plan: FusionPlan) -> int:
    return sum(len(group) - 1 for group in plan.groups)


def test_more_is_dropped_only_while_that_alone_costs_less() -> None:
    search = toy()
    found = search.best_at(4.0)
    assert found.plan.dropped_attention == (4, 5) and found.depth == 4
    assert search.tried == [(2, 4.0)], "to drop a third one costs 0.09 alone, what was found costs 0.08"


def test_a_budget_that_is_not_kept_says_what_is_possible() -> None:
    with pytest.raises(PlanError, match=r"at 4 FFNs the best one costs \+0.0800 nats"):
        toy().best_at(4.0, Budget(max_kl=0.01))
    with pytest.raises(PlanError, match="nothing from 0 starts"):
        toy().best_at(0.0 - LAYERS)


def test_without_a_guide_the_lowest_price_comes_first() -> None:
    search = toy()
    found = search.cheapest(Budget(max_kl=0.175))
    assert search.tried == [(5, 1.0), (5, 2.0), (5, 3.0), (5, 4.0), (3, 3.0)], "5 dropped cost 0.15, 2 merges 0.02"
    assert found.depth == 3 and len(found.plan.dropped_attention) == 3, "a later start may be better"


def test_with_a_guide_few_prices_are_tried() -> None:
    search = toy(expected=PER_MERGE)
    search.cheapest(Budget(max_kl=1.0))
    assert search.tried == [(5, 1.0)], "all that can be merged is expected to be within, and it is"
    search = toy(expected=PER_MERGE)
    assert search.cheapest(Budget(max_kl=0.155)).depth == 3
    assert search.tried[:2] == [(5, 1.0), (5, 3.0)], "it costs 4 times what is expected, so 3 merges are next"
