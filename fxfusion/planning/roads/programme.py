"""The best sets of disjoint segments, by dynamic programming over layers.

    best[p]: for each price, the sets of segments in front of layer p with the least cost
    best[p] = best[p - 1], and best[s.first] joined with every segment s that ends at layer p - 1

Costs and prices of segments are taken to add up. For prices that is true; for costs (losses) it is a guess that makes
proposals, which are then measured as a whole. Source: issue 7.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxfusion.planning.roads.segment import Segment

_PRICES = 256  # that are told apart, from the highest to the lowest


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
