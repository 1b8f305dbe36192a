"""Candidates: sets of disjoint segments of least total cost, for each price, by dynamic programming over layers.

    best[p]: for each price, the sets of segments in front of layer p with the least cost
    best[p] = best[p - 1], and best[s.first] joined with every segment s that ends at layer p - 1

What a segment costs alone is taken to add up (or the largest of the costs counts), and so is what it saves. For prices
that is true; for costs it is a guess that makes candidates, which are then measured as a whole. Chains of FFNs and
windows of layers are cut alike: their segments differ in where the costs come from.
Source: arXiv 2503.18908, section 4 and appendix B (there picked by eye, and greedily).
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxfusion.planning.roads.road import Segment

_PRICES = 256  # that are told apart, from the highest to the lowest


@dataclass(frozen=True, slots=True)
class Offer:
    """A segment on its own: what it is taken to cost, and by how much it lowers the price of the model."""

    segment: Segment
    cost: float
    saved: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """Disjoint segments, with their costs together (as joined by `propose`) and the sum of what they save."""

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


_Rival = tuple[float, float, Segment | None, Proposal]  # cost, minus what is saved, the last segment, what is before


def propose(
    layers: int, offers: Sequence[Offer], keep: int = 1, join: Callable[[float, float], float] = operator.add
) -> list[Proposal]:
    """For each price (of at most 256), the `keep` sets of segments of least cost, by price and cost.

    `join`: what two costs are together, their sum or their maximum; the cost of nothing is 0. Of sets that cost the
    same to the last bit, the one that leaves the last layer alone wins, then the one whose last segment was offered
    first. The set of nothing at all comes first: what saves most comes last.
    """
    ending: dict[int, list[Offer]] = {}
    for offer in offers:
        ending.setdefault(offer.segment.last, []).append(offer)
    step = _step(layers, ending)
    best: list[Mapping[int, list[Proposal]]] = [{0: [Proposal()]}]
    for layer in range(layers):
        found: dict[int, list[_Rival]] = {
            price: [(one.cost, -one.saved, None, one) for one in known] for price, known in best[-1].items()
        }
        for offer in ending.get(layer, ()):
            for known in best[offer.segment.first].values():
                for before in known:
                    saved = before.saved + offer.saved
                    rival = (join(before.cost, offer.cost), -saved, offer.segment, before)
                    found.setdefault(round(saved / step), []).append(rival)
        best.append({price: _least(rivals, keep) for price, rivals in found.items()})
    return [proposal for _, known in sorted(best[-1].items()) for proposal in known]


def _least(rivals: Sequence[_Rival], keep: int) -> list[Proposal]:
    return [
        before if last is None else Proposal(cost, -saved, last, before)
        for cost, saved, last, before in heapq.nsmallest(keep, rivals, key=operator.itemgetter(0, 1))
    ]


def front(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Those that no other beats in both cost and price, the least saving first."""
    found: list[Proposal] = []
    for proposal in sorted(proposals, key=lambda one: (-one.saved, one.cost)):
        if not found or proposal.cost < found[-1].cost:
            found.append(proposal)
    return found[::-1]


def _step(layers: int, ending: Mapping[int, Sequence[Offer]]) -> float:
    """Between prices that are told apart: whole numbers of FFNs stay whole."""
    most = [0.0]
    for layer in range(layers):
        ways = [most[offer.segment.first] + offer.saved for offer in ending.get(layer, ())]
        most.append(max([most[-1], *ways]))
    whole = all(float(offer.saved).is_integer() for offers in ending.values() for offer in offers)
    return max(1.0, most[-1] / _PRICES) if whole else (most[-1] / _PRICES or 1.0)
