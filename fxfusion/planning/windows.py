"""The best plan over several roads: proposed by dynamic programming, decided by measuring whole plans.

    screen    what each window costs alone                        many short measurements
    propose   disjoint windows of least total cost, by price      no measurement
    try       the best proposals as whole plans, as they are      a few measurements
    refit     the best of these after their refit                 few long measurements, and they decide

Proposals come by dynamic programming over layers:

    best[p]: for each price, the sets of segments in front of layer p with the least cost
    best[p] = best[p - 1], and best[s.first] joined with every segment s that ends at layer p - 1

Costs and prices of segments are taken to add up. For prices that is true; for costs (losses) it is a guess that makes
proposals, which are then measured as a whole. Source: arXiv 2503.18908, appendix B.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fxfusion.analysis.meter import PlanMeter
from fxfusion.errors import NotFusedError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget, Measured
from fxfusion.planning.price import Price, merged
from fxfusion.planning.scores import RefitMeter, Road, Screen, Segment, increase, is_on_one_road, plan_of
from fxfusion.report.progress import reporting

_KEPT = 4  # proposals for each price
_TRIED, _JUDGED = 8, 3  # whole plans that are measured for one price on the text of the screen, and by the judge
# A window that costs more alone than so many times what the whole plan may cost is hopeless, and so are longer ones.
# A refit takes much of a window's cost back.
_SLACK, _SLACK_AFTER_REFIT = 2.0, 8.0
_PROBES, _PROBES_AFTER_REFIT = 12, 4  # prices that are tried on the way to the least one within a budget
_JUDGED_ON_THE_WAY = 2
_PRICES = 256  # that are told apart, from the highest to the lowest
_LEAST = 1e-6  # nats: what measures as a gain is chance


@dataclass(slots=True)
class RoadSearch:
    """`judge`: measures the few plans that are left, on more text than the screen. `refitted`: the same after a refit,
    None where plans are judged as they are."""

    screen: Screen
    price: Price
    judge: PlanMeter
    refitted: RefitMeter | None = None
    found: dict[FusionPlan, Measured] = field(default_factory=dict)
    recovery: dict[Road, float] = field(default_factory=dict)
    _proposals: list[Proposal] | None = None
    _on_one_road: list[list[Proposal]] | None = None

    @property
    def meter(self) -> PlanMeter:
        return self.screen.meter

    @property
    def intact(self) -> Measured:
        """The model as it is."""
        return self.measure(FusionPlan(norm=self.screen.norm))

    def measure(self, plan: FusionPlan) -> Measured:
        """A whole plan, after its refit where one follows."""
        if plan not in self.found:
            quality = (self.judge if self.refitted is None else self.refitted).quality(plan)
            size = sum(self.meter.members[member][1] for group in plan.groups for member in group)
            self.found[plan] = Measured(plan, self.meter.ffns - merged(plan), size, quality)
        return self.found[plan]

    def best_at(self, most: float) -> Measured:
        """The plan of least loss at a price of at most `most`. Raises `PlanError` where there is none."""
        self.screen.run(lambda: _SLACK * self._cheapest_at(most))
        self._renew()
        return self._best_at(most)

    def cheapest(self, budget: Budget) -> Measured:
        """The plan of least price within the budget's quality; the intact model where nothing else is."""
        slack = _SLACK if self.refitted is None else _SLACK_AFTER_REFIT
        self.screen.run(lambda: slack * budget.allowed_loss)
        self._renew()
        if not any(segment.size > 1 for segment in self.screen.costs):
            warnings.warn(f"no window of layers can be had{self._reasons()}", stacklevel=3)
        ladder = [proposal for proposal in front(self.proposals) if proposal.saved > 0]
        low, high, factor = -1, len(ladder), 1.0  # up to low within the budget, from high on outside
        for _ in range(_PROBES if self.refitted is None else _PROBES_AFTER_REFIT):
            if high - low < 2:
                break
            middle = sum(proposal.cost * factor <= budget.allowed_loss for proposal in ladder) - 1
            if not low < middle < high:
                middle = (low + high) // 2
            try:
                found = self._best_at(self.intact_price - ladder[middle].saved, on_the_way=True)
            except PlanError:  # windows that can be had alone, but not together
                high = middle
                continue
            factor = max(found.cost, _LEAST) / max(ladder[middle].cost, _LEAST)
            if budget.allows(found.quality):
                low = middle
            else:
                high = middle
        return self.within(budget)

    def within(self, budget: Budget) -> Measured:
        """Of all plans measured so far, the one of least price within the budget, then of least loss."""
        allowed = [one for one in (self.intact, *self.found.values()) if budget.allows(one.quality)]
        if not allowed:
            raise PlanError(f"the intact model itself is outside the budget: {budget}")
        return min(allowed, key=lambda one: (self.price.of(one.plan), one.cost))

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

    def _offers(self, recovery: Mapping[Road, float], roads: Sequence[Road] | None = None) -> list[Offer]:
        """Each screened segment, and each with one more attention dropped: that cost is taken to add.

        `roads`: on these alone.
        """
        costs = {
            segment: max(cost, _LEAST) * recovery.get(segment.road, 1.0)
            for segment, cost in self.screen.costs.items()
            if segment.road in (roads or self.screen.roads) or self._moves_nothing(segment)
        }
        alone = {segment.first: cost for segment, cost in costs.items() if segment.size == 1}
        for segment, cost in list(costs.items()):
            for layer in segment.layers if segment.size > 1 else ():
                if layer in alone and layer not in segment.dropped:
                    costs[segment.without(layer)] = cost + alone[layer]
        mixers, intact = self.screen.mixers, self.intact_price
        return [
            Offer(segment, cost, intact - self.price.of(plan_of([segment], mixers))) for segment, cost in costs.items()
        ]

    @property
    def intact_price(self) -> float:
        return self.price.of(FusionPlan())

    def _cheapest_at(self, most: float) -> float:
        """The least cost, as windows add up, at which the price can be had; infinite where it cannot yet."""
        known = propose(self.screen.layers, self._offers({}))
        return min((one.cost for one in known if self._reaches(one, most)), default=math.inf)

    def _reaches(self, proposal: Proposal, most: float) -> bool:
        return self.intact_price - proposal.saved <= most * (1 + 1e-9)

    def _best_at(self, most: float, on_the_way: bool = False) -> Measured:
        fitting = self._fitting(self.proposals, most)
        if not fitting:
            raise PlanError(self._why_none(most))
        # Each road alone too, so that several roads never lose more than one of them.
        alone = [] if on_the_way else [self._fitting(proposals, most) for proposals in self.on_one_road]
        plans = {self._plan(one): one for proposals in (fitting, *alone) for one in proposals}
        expected: dict[FusionPlan, float] = {}
        with reporting(self.screen.progress, f"whole plans, {self.price.text(most)}", len(plans)) as advance:
            for plan, proposal in plans.items():
                found = self._expected(plan, proposal)
                if found is not None:
                    expected[plan] = found
                advance(1)
        if not expected:
            raise PlanError(f"none of the plans that were tried for {self.price.text(most)} can be had")
        ranked = sorted(expected, key=expected.__getitem__)
        count = _JUDGED_ON_THE_WAY if on_the_way else _JUDGED
        best_alone = [self._first(ranked, proposals) for proposals in alone]
        for plan in (*self._finalists(ranked, count), *(plan for plan in best_alone if plan is not None)):
            self.measure(plan)
        reached = [one for one in self.found.values() if self.price.of(one.plan) <= most * (1 + 1e-9)]
        best = min(reached, key=lambda one: one.cost)
        plain = min((one for one in reached if is_on_one_road(one.plan)), key=lambda one: one.cost, default=best)
        # Many mixed plans are tried, so that the best of them looks better than it is.
        return best if best.upper < plain.cost else plain

    def _fitting(self, proposals: Sequence[Proposal], most: float) -> list[Proposal]:
        """Those that are worth trying at a price of at most `most`, the best expected first."""
        return sorted((one for one in proposals if self._reaches(one, most)), key=lambda one: one.cost)[:_TRIED]

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
        return max(as_is, _LEAST) * proposal.cost / max(summed, _LEAST)

    def _alone(self, segment: Segment) -> float:
        """The measured costs that an offer was made of."""
        known = self.screen.costs
        if segment in known:
            return max(known[segment], _LEAST)
        extra = next(layer for layer in segment.dropped if segment.keeping(layer) in known)
        alone = known[Segment(extra, extra, "drop", (extra,))]
        return max(known[segment.keeping(extra)], _LEAST) + max(alone, _LEAST)

    def _measured_recovery(self, refitted: RefitMeter) -> dict[Road, float]:
        """Which part of its cost a refit leaves on each road: from one plan that merges about a quarter of the FFNs."""
        found: dict[Road, float] = {}
        with reporting(self.screen.progress, "what a refit takes back", len(self.screen.roads)) as advance:
            for road in self.screen.roads:
                plan = self._typical(road)
                if plan is not None:
                    before, after = increase(self.meter, plan), refitted.quality(plan).loss_increase
                    assert after is not None
                    found[road] = min(max(float(after), _LEAST) / max(before, _LEAST), 1.0)
                advance(1)
        return found

    def _typical(self, road: Road) -> FusionPlan | None:
        offers = [offer for offer in self._offers({}, [road]) if offer.segment.size > 1 and offer.saved > 0]
        known = [one for one in propose(self.screen.layers, offers) if one.saved > 0]
        enough = [one for one in known if len(one.segments) >= max(1, self.screen.layers // 4)]
        chosen = min(enough or known, key=lambda one: one.cost, default=None)
        return None if chosen is None else self._plan(chosen)

    def _why_none(self, most: float) -> str:
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


# --- proposals ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """A segment on its own: what it is taken to cost [nats], and by how much it lowers the price of the model."""

    segment: Segment
    cost: float
    saved: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """Disjoint segments, with the sums of their costs and of what they save."""

    cost: float = 0.0
    saved: float = 0.0
    last: Segment | None = None
    before: Proposal | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """In order."""
        return tuple(self._backwards())[::-1]

    def _backwards(self) -> Iterator[Segment]:
        at: Proposal | None = self
        while at is not None and at.last is not None:
            yield at.last
            at = at.before


def propose(layers: int, offers: Sequence[Offer], keep: int = 1) -> list[Proposal]:
    """For each price (of at most 256), the `keep` sets of segments of least total cost, by price and cost.

    The one of nothing at all comes first: what saves most comes last.
    """
    ending: dict[int, list[Offer]] = {}
    for offer in offers:
        ending.setdefault(offer.segment.last, []).append(offer)
    step = _step(layers, ending)
    best: list[Mapping[int, list[Proposal]]] = [{0: [Proposal()]}]
    for layer in range(layers):
        found: dict[int, list[Proposal]] = {price: list(known) for price, known in best[-1].items()}
        for offer in ending.get(layer, ()):
            for known in best[offer.segment.first].values():
                for before in known:
                    joined = Proposal(before.cost + offer.cost, before.saved + offer.saved, offer.segment, before)
                    found.setdefault(round(joined.saved / step), []).append(joined)
        best.append({price: heapq.nsmallest(keep, rivals, key=_rank) for price, rivals in found.items()})
    return [proposal for _, known in sorted(best[-1].items()) for proposal in known]


def front(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Those that no other beats in both cost and price, the least saving first."""
    found: list[Proposal] = []
    for proposal in sorted(proposals, key=lambda one: (-one.saved, one.cost)):
        if not found or proposal.cost < found[-1].cost:
            found.append(proposal)
    return found[::-1]


def _rank(proposal: Proposal) -> tuple[float, float]:
    return proposal.cost, -proposal.saved


def _step(layers: int, ending: Mapping[int, Sequence[Offer]]) -> float:
    """Between prices that are told apart: whole numbers of FFNs stay whole."""
    most = [0.0]
    for layer in range(layers):
        ways = [most[offer.segment.first] + offer.saved for offer in ending.get(layer, ())]
        most.append(max([most[-1], *ways]))
    whole = all(float(offer.saved).is_integer() for offers in ending.values() for offer in offers)
    return max(1.0, most[-1] / _PRICES) if whole else (most[-1] / _PRICES or 1.0)
