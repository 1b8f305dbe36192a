"""Choice: the best measured plan at a price, the one of least price within a quality, and one for every depth.

    candidates    segments, and sets of them, by price                  no measurement
    scores        what each segment is taken to cost                    many short measurements
    choice        whole plans measured, the best of them taken          few measurements, and they decide
    plan          with what it was made for, from and by

A price is an FFN depth or a predicted latency. Two kinds of search say which plans are tried: in chains of FFNs that
dropped attention leaves (`fxfusion.planning.chains`), and over roads (`fxfusion.planning.windows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.scores import AttentionScores
from fxfusion.errors import PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget, Measured
from fxfusion.planning.price import Price, merged

ANYTHING = Budget()
ROUNDING = 1 + 1e-9  # a price may be above a bound by so much
LEAST = 1e-6  # nats: what measures as a gain is chance
Start = tuple[int, ...]
"""Layers that have lost their attention before anything is moved or fused."""
Rung = tuple[float, float]
"""A price, and the loss that is expected there [nats]; 0 where nothing is expected."""


@dataclass(slots=True)
class Search(ABC):
    """`judge`: measures the plans that are chosen between. `found`: those that it has measured."""

    judge: PlanMeter
    price: Price
    progress: bool = False
    found: dict[FusionPlan, Measured] = field(default_factory=dict)

    # What a kind of search says of itself.

    @property
    @abstractmethod
    def intact(self) -> Measured:
        """The model as it is."""

    @abstractmethod
    def rounds(self, most: float, budget: Budget) -> Iterable[Sequence[Start]]:
        """What to start from at a price of at most `most`. A later round only drops more attention."""

    @abstractmethod
    def starts_within(self, budget: Budget) -> Sequence[Start]:
        """What to start from within a quality, what drops most first."""

    @abstractmethod
    def ladder(self, start: Start) -> list[Rung]:
        """The prices that can be had, the highest first."""

    @abstractmethod
    def try_at(self, start: Start, most: float, budget: Budget, on_the_way: bool = False) -> Measured | None:
        """The plan of least loss at a price of at most `most`; None where there is none. `on_the_way`: it is not yet
        the one to be chosen."""

    @abstractmethod
    def least_price(self, start: Start) -> float:
        """The price with everything fused: no plan from here is taken to be below it."""

    @abstractmethod
    def why_none(self, starts: Sequence[Start], most: float | None) -> str:
        """What can be had instead."""

    @abstractmethod
    def every_depth(self, drops: Sequence[int] | None) -> Iterator[tuple[Start, int]]:
        """What to start from and the depth to try, for a sweep. `drops`: numbers of attentions to drop."""

    def settled(self, best: Measured | None, starts: Sequence[Start], budget: Budget) -> Measured:
        """What is chosen within a quality, where `best` was found on the way."""
        if best is None:
            raise PlanError(self.why_none(starts, None))
        return best

    @property
    def known_scores(self) -> AttentionScores | None:
        """What each attention is worth, if that was asked."""
        return None

    def most_tries(self, rungs: int) -> int:
        """Prices that are tried on the way to the least one."""
        return rungs

    def quality(self, plan: FusionPlan) -> Quality:
        """As the plan is judged."""
        return self.judge.quality(plan)

    def bytes_of(self, plan: FusionPlan) -> int:
        """Memory of the wide weights."""
        return sum(self.judge.members[member][1] for group in plan.groups for member in group)

    # What all of them do.

    def measure(self, plan: FusionPlan) -> Measured:
        """A whole plan."""
        if plan not in self.found:
            depth = self.judge.ffns - merged(plan)
            self.found[plan] = Measured(plan, depth, self.bytes_of(plan), self.quality(plan))
        return self.found[plan]

    def unfused(self, start: Start) -> Measured:
        """What dropping some attention costs before anything is fused."""
        return self.intact if not start else self.measure(FusionPlan(dropped_attention=sorted(start)))

    def choose(self, budget: Budget) -> Measured:
        """The best plan within the budget: at a price the one of least loss, else the one of least price."""
        if budget.most is not None:
            return self.best_at(budget.most, budget)
        return self.cheapest(budget) if budget.limits_quality else self.fewest(budget)

    def fewest(self, budget: Budget) -> Measured:
        """The plan to take where neither a price nor a quality is asked for."""
        return self.cheapest(budget)

    def best_at(self, most: float, budget: Budget = ANYTHING) -> Measured:
        """The plan of least loss at a price of at most `most`. Raises `PlanError` that says what is possible."""
        best: Measured | None = None
        tried: list[Start] = []
        for starts in self.rounds(most, budget):
            if best is not None and all(self.unfused(start).cost >= best.cost for start in starts):
                break  # fusing costs on top of dropping
            for start in starts:
                found = self.try_at(start, most, budget)
                best = min(_those(best, found), key=lambda one: one.cost, default=None)
            tried += starts
        if best is None:
            raise PlanError(self.why_none(tried, most))
        if not budget.allows(best.quality):
            text = self.price.text(most)
            raise PlanError(f"no plan fits the budget; at {text} the best one costs {best.cost:+.4f} nats per token")
        return best

    def cheapest(self, budget: Budget) -> Measured:
        """The plan of least price within the budget's quality, and of those the one of least loss."""
        best: Measured | None = None
        starts = self.starts_within(budget)
        for start in starts:
            if not budget.allows(self.unfused(start).quality):
                continue  # fusing costs on top of dropping
            if best is None or self.least_price(start) <= self.price.of(best.plan):
                best = min(_those(self._lowest(start, budget, best), best), key=self.rank, default=None)
        return self.settled(best, starts, budget)

    def _lowest(self, start: Start, budget: Budget, rival: Measured | None) -> Measured | None:
        """The plan of least price from one start, no higher than the rival's; None where there is none."""
        bound = float("inf") if rival is None else self.price.of(rival.plan) * ROUNDING
        ladder = [rung for rung in self.ladder(start) if rung[0] <= bound]
        kept: Measured | None = None
        low, high, factor = -1, len(ladder), 1.0  # up to low within the budget, from high on outside
        for _ in range(self.most_tries(len(ladder))):
            if high - low < 2:
                break
            middle = self._next(ladder, low, high, budget.allowed_loss / factor)
            price, expected = ladder[middle]
            found = self.try_at(start, price, budget, on_the_way=True)
            if found is not None:
                factor = max(found.cost, LEAST) / max(expected, LEAST)
            if found is not None and budget.allows(found.quality):
                low, kept = middle, found
            else:
                high = middle
        return kept

    def _next(self, ladder: Sequence[Rung], low: int, high: int, allowed: float) -> int:
        """The rung to try: where the loss that is expected is just allowed, else in the middle; without a guide the
        lowest price that is left."""
        if not ladder[-1][1]:
            return high - 1
        middle = sum(expected <= allowed for _, expected in ladder) - 1
        return middle if low < middle < high else (low + high) // 2

    def rank(self, one: Measured) -> tuple[float, float]:
        """What is least is chosen within a quality."""
        return self.price.of(one.plan), one.cost


def _those(*found: Measured | None) -> list[Measured]:
    return [one for one in found if one is not None]
