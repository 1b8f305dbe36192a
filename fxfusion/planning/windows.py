"""The search over roads: whole plans of windows that were screened alone, judged as they are or after their refit.

    screen    what each window costs alone                        many short measurements
    propose   disjoint windows of least total cost, by price      no measurement
    try       the best proposals as whole plans, as they are      a few measurements
    refit     the best of these after their refit                 few long measurements, and they decide

Source: arXiv 2503.18908, appendix B.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality
from fxfusion.errors import NotFusedError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget, Measured
from fxfusion.planning.candidates import Offer, Proposal, front, propose
from fxfusion.planning.choice import ANYTHING, LEAST, ROUNDING, Rung, Search, Start
from fxfusion.planning.roads import ROADS, is_on_one_road, plan_of
from fxfusion.planning.roads.road import Segment
from fxfusion.planning.scores import RefitMeter, Screen, increase
from fxfusion.report.progress import each, reporting

_KEPT = 4  # proposals for each price
TRIED, _JUDGED = 8, 3  # whole plans that are measured for one price on the text of the screen, and by the judge
# A window that costs more alone than so many times what the whole plan may cost is hopeless, and so are longer ones.
# A refit takes much of a window's cost back.
_SLACK, _SLACK_AFTER_REFIT = 2.0, 8.0
_PROBES, PROBES_AFTER_REFIT = 12, 4  # prices that are tried on the way to the least one within a budget
JUDGED_ON_THE_WAY = 2


@dataclass(slots=True, kw_only=True)
class WindowSearch(Search):
    """`judge`: measures the few plans that are left, on more text than the screen. `refitted`: the same after a refit,
    None where plans are judged as they are."""

    screen: Screen
    refitted: RefitMeter | None = None
    recovery: dict[str, float] = field(default_factory=dict)
    _proposals: list[Proposal] | None = None
    _on_one_road: list[list[Proposal]] | None = None

    @property
    def meter(self) -> PlanMeter:
        """What measures windows, and plans as they are."""
        return self.screen.meter

    @property
    def intact(self) -> Measured:
        return self.measure(FusionPlan(norm=self.screen.norm))

    def quality(self, plan: FusionPlan) -> Quality:
        """After a refit where one follows."""
        return (self.judge if self.refitted is None else self.refitted).quality(plan)

    def rounds(self, most: float, budget: Budget) -> Iterable[Sequence[Start]]:
        self.screen.run(lambda: _SLACK * self._cheapest_at(most))
        self._renew()
        return [[()]]

    def starts_within(self, budget: Budget) -> Sequence[Start]:
        slack = _SLACK if self.refitted is None else _SLACK_AFTER_REFIT
        self.screen.run(lambda: slack * budget.allowed_loss)
        self._renew()
        if not any(ROADS[segment.road].lowers_depth(segment) for segment in self.screen.costs):
            warnings.warn(f"no window of layers can be had{self._reasons()}", stacklevel=3)
        return [()]

    def ladder(self, start: Start) -> list[Rung]:
        """What the proposals that no other beats reach, and are expected to cost."""
        return [(self.intact_price - one.saved, one.cost) for one in front(self.proposals) if one.saved > 0]

    def most_tries(self, rungs: int) -> int:
        return _PROBES if self.refitted is None else PROBES_AFTER_REFIT

    def least_price(self, start: Start) -> float:
        return -math.inf

    def every_depth(self, drops: Sequence[int] | None) -> Iterator[tuple[Start, int]]:
        for depth in each(range(self.judge.ffns, 0, -1), self.progress, "sweep"):
            if depth < self.judge.ffns:
                self.rounds(depth, ANYTHING)
            yield (), depth

    def settled(self, best: Measured | None, starts: Sequence[Start], budget: Budget) -> Measured:
        """Of all plans measured so far; the intact model where nothing else is within the budget."""
        allowed = [one for one in (self.intact, *self.found.values()) if budget.allows(one.quality)]
        if not allowed:
            raise PlanError(f"the intact model itself is outside the budget: {budget}")
        return min(allowed, key=self.rank)

    @property
    def proposals(self) -> list[Proposal]:
        """Sets of windows with their expected cost, after the refit where one follows."""
        if self._proposals is None:
            self._proposals = propose(self.screen.layers, self._offers(self.recovery), _KEPT)
        return self._proposals

    @property
    def on_one_road(self) -> list[list[Proposal]]:
        """The same with all windows on one road, for each road in turn; nothing where there is only one."""
        if self._on_one_road is None:
            roads = self.screen.roads if len(self.screen.roads) > 1 else ()
            self._on_one_road = [
                propose(self.screen.layers, self._offers(self.recovery, [road]), _KEPT) for road in roads
            ]
        return self._on_one_road

    def _renew(self) -> None:
        """Propose anew, with what a refit takes back on each road."""
        if self.refitted is not None and not self.recovery:
            self.recovery = self._measured_recovery(self.refitted)
        self._proposals = self._on_one_road = None

    def _offers(self, recovery: Mapping[str, float], roads: Sequence[str] | None = None) -> list[Offer]:
        """Each screened segment, and each with one more attention dropped: that cost is taken to add.

        `roads`: on these alone.
        """
        costs = {
            segment: max(cost, LEAST) * recovery.get(segment.road, 1.0)
            for segment, cost in self.screen.costs.items()
            if segment.road in (roads or self.screen.roads) or self._moves_nothing(segment)
        }
        alone = {one.first: cost for one, cost in costs.items() if one.size == 1 and one.dropped}
        for segment, cost in list(costs.items()):
            for layer in segment.layers if segment.size > 1 else ():
                if layer in alone and layer not in segment.dropped:
                    costs[segment.without(layer)] = cost + alone[layer]
        saves, mixers = self.price.of, self.screen.mixers
        return [Offer(one, cost, ROADS[one.road].saves(one, mixers, saves)) for one, cost in costs.items()]

    @property
    def intact_price(self) -> float:
        return self.price.of(FusionPlan())

    def _cheapest_at(self, most: float) -> float:
        """The least cost, as windows add up, at which the price can be had; infinite where it cannot yet."""
        known = propose(self.screen.layers, self._offers({}))
        return min((one.cost for one in known if self._reaches(one, most)), default=math.inf)

    def _reaches(self, proposal: Proposal, most: float) -> bool:
        return self.intact_price - proposal.saved <= most * ROUNDING

    def try_at(self, start: Start, most: float, budget: Budget, on_the_way: bool = False) -> Measured | None:
        fitting = self._fitting(self.proposals, most)
        # Each road alone too, so that several roads never lose more than one of them.
        alone = [] if on_the_way else [self._fitting(proposals, most) for proposals in self.on_one_road]
        plans = {self._plan(one): one for proposals in (fitting, *alone) for one in proposals}
        expected: dict[FusionPlan, float] = {}
        with reporting(self.progress and bool(plans), f"whole plans, {self.price.text(most)}", len(plans)) as advance:
            for plan, proposal in plans.items():
                found = self._expected(plan, proposal)
                if found is not None:
                    expected[plan] = found
                advance(1)
        if not expected:
            return None
        ranked = sorted(expected, key=expected.__getitem__)
        count = JUDGED_ON_THE_WAY if on_the_way else _JUDGED
        best_alone = [self._first(ranked, proposals) for proposals in alone]
        for plan in (*self._finalists(ranked, count), *(plan for plan in best_alone if plan is not None)):
            self.measure(plan)
        reached = [one for one in self.found.values() if self.price.of(one.plan) <= most * ROUNDING]
        return self._surely_best(reached) if reached else None

    def _surely_best(self, reached: Sequence[Measured]) -> Measured:
        """The best one; roads are mixed only where that is surely better: many mixed plans are tried, so that the best
        of them looks better than it is."""
        best = min(reached, key=lambda one: one.cost)
        plain = min((one for one in reached if is_on_one_road(one.plan)), key=lambda one: one.cost, default=best)
        return best if best.upper < plain.cost else plain

    def _fitting(self, proposals: Sequence[Proposal], most: float) -> list[Proposal]:
        """Those that are worth trying at a price of at most `most`, the best expected first."""
        return sorted((one for one in proposals if self._reaches(one, most)), key=lambda one: one.cost)[:TRIED]

    def _first(self, ranked: Sequence[FusionPlan], proposals: Sequence[Proposal]) -> FusionPlan | None:
        plans = {self._plan(one) for one in proposals}
        return next((plan for plan in ranked if plan in plans), None)

    def _finalists(self, ranked: Sequence[FusionPlan], count: int) -> Sequence[FusionPlan]:
        """Those that are worth the judge's time: the first ones, and all that it knows."""
        if self.judge is self.meter and self.refitted is None:
            return ranked
        judge = self.judge if self.refitted is None else self.refitted
        return [*ranked[:count], *(plan for plan in ranked[count:] if judge.knows(plan))]

    def _plan(self, proposal: Proposal) -> FusionPlan:
        return plan_of(proposal.segments, self.screen.mixers, self.screen.norm)

    def _expected(self, plan: FusionPlan, proposal: Proposal) -> float | None:
        """The cost to expect of a whole plan: what it costs as it is, and on each road what a refit leaves of that.

        None for windows that cannot be had together.
        """
        try:
            as_is = increase(self.meter, plan)
        except NotFusedError as error:
            self.screen.refused.update(dict.fromkeys(proposal.segments, str(error)))
            return None
        summed = sum(self._alone(segment) for segment in proposal.segments)
        return max(as_is, LEAST) * proposal.cost / max(summed, LEAST)

    def _alone(self, segment: Segment) -> float:
        """The measured costs that an offer was made of."""
        known = self.screen.costs
        if segment in known:
            return max(known[segment], LEAST)
        extra = next(layer for layer in segment.dropped if segment.keeping(layer) in known)
        alone = next(cost for one, cost in known.items() if one.size == 1 and one.dropped == (extra,))
        return max(known[segment.keeping(extra)], LEAST) + max(alone, LEAST)

    def _measured_recovery(self, refitted: RefitMeter) -> dict[str, float]:
        """Which part of its cost a refit leaves on each road: from one plan that merges about a quarter of the FFNs."""
        found: dict[str, float] = {}
        with reporting(self.progress, "what a refit takes back", len(self.screen.roads)) as advance:
            for road in self.screen.roads:
                plan = self._typical(road)
                if plan is not None:
                    before, after = increase(self.meter, plan), refitted.quality(plan).loss_increase
                    assert after is not None
                    found[road] = min(max(float(after), LEAST) / max(before, LEAST), 1.0)
                advance(1)
        return found

    def _typical(self, road: str) -> FusionPlan | None:
        offered = self._offers({}, [road])
        offers = [offer for offer in offered if ROADS[road].lowers_depth(offer.segment) and offer.saved > 0]
        known = [one for one in propose(self.screen.layers, offers) if one.saved > 0]
        enough = [one for one in known if len(one.segments) >= max(1, self.screen.layers // 4)]
        chosen = min(enough or known, key=lambda one: one.cost, default=None)
        return None if chosen is None else self._plan(chosen)

    def why_none(self, starts: Sequence[Start], most: float | None) -> str:
        assert most is not None, "within a quality there is the intact model"
        if self._fitting(self.proposals, most):
            return f"none of the plans that were tried for {self.price.text(most)} can be had"
        least = self.intact_price - max((one.saved for one in self.proposals), default=0.0)
        words = f"no plan reaches {self.price.text(most)}; the windows that can be had reach {self.price.text(least)}"
        return words + self._reasons()

    def _moves_nothing(self, segment: Segment) -> bool:
        """Whether a window has no attention between its FFNs: then it belongs to every road."""
        return segment.size > 1 and not segment.dropped and not set(segment.layers[1:]).intersection(self.screen.mixers)

    def _reasons(self) -> str:
        """Why windows are missing."""
        words = ""
        lacking = [layer for layer in range(self.screen.layers) if layer not in self.meter.members]
        if lacking:
            words += f"; layers {lacking} hold no FFN that can be fused (`fxfusion explain` says why)"
        reasons = list(dict.fromkeys(self.screen.refused.values()))
        return words + (f" ({len(self.screen.refused)} were refused, such as: {reasons[0]})" if reasons else "")
