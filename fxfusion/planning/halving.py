"""Successive halving: what many windows cost alone, the hopeful ones closely and the others by a guess.

    all            how far the stream is off at the window's end         no later layer is computed
    better half    the loss of the first tokens
    quarter        the loss of all tokens

What is not measured closely is guessed: of the better half the loss of few tokens, of the others a loss that grows with
the square of how far they are off, as in the better half. No window is lost: a plan of many FFNs less may need all.

Source: successive halving, arXiv 1502.07943, algorithm 1; rank correlations with the true loss: docs/real_model.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial

from fxfusion.analysis.meter import plan_key
from fxfusion.analysis.store import Store
from fxfusion.analysis.window_meter import WindowMeter
from fxfusion.errors import NotFusedError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.roads.road import Segment

FEWEST = 8  # windows for which it is worth its while
_CLOSELY = 4  # at least, however few there are
_SMALL = 1e-6  # how far off, squared, is taken for nothing


class Halving:
    """`meter`: what it measures with. `store`: what was measured before, found again where a search goes on.

    `refused`: why windows cannot be had; `off`, `roughly`, `closely`: what was measured of the others.
    """

    def __init__(self, meter: WindowMeter, store: Store) -> None:
        self.meter, self.store = meter, store
        self._known: dict[str, float | None] = store.data.setdefault("windows", {})
        if not isinstance(self._known, dict):
            raise store.broken("windows is no object")
        self.refused: dict[Segment, str] = {}
        self.off: dict[Segment, float] = {}
        self.roughly: dict[Segment, float] = {}
        self.closely: dict[Segment, float] = {}

    def costs(self, plans: Mapping[Segment, FusionPlan], advance: Callable[[int], None]) -> dict[Segment, float]:
        """Nats per token that each of them costs, those left out that cannot be had. `advance(1)`: after
        each of `steps` measurements."""
        with self.store:
            for segment, plan in plans.items():
                found = self._off(segment, plan)
                if isinstance(found, str):
                    self.refused[segment] = found
                else:
                    self.off[segment] = found
                advance(1)
            return self._refined({one: plan for one, plan in plans.items() if one in self.off}, advance)

    def _off(self, segment: Segment, plan: FusionPlan) -> float | str:
        """Or why it cannot be had. Where the window's end cannot be told it is taken for the best, and so measured."""
        try:
            found = self._measured("off", plan, lambda: self.meter.distance(plan, segment.first, segment.last))
        except NotFusedError as error:
            return str(error)
        if found is not None and not math.isfinite(found):
            return f"with layers {segment.first} to {segment.last} changed the stream is not finite"
        return 0.0 if found is None else found

    def _refined(self, plans: Mapping[Segment, FusionPlan], advance: Callable[[int], None]) -> dict[Segment, float]:
        half = sorted(plans, key=self.off.__getitem__)[: _part(len(plans), 2)]
        self.roughly |= self._losses("roughly", {one: plans[one] for one in half}, 1, advance)
        known = [one for one in half if one in self.roughly]
        best = sorted(known, key=self.roughly.__getitem__)[: _part(len(plans), 4)]
        self.closely |= self._losses("closely", {one: plans[one] for one in best}, None, advance)
        rates = [max(self.roughly[one], 0.0) / max(self.off[one] ** 2, _SMALL) for one in known]
        rate = statistics.median(rates) if rates else 0.0
        found = {one: rate * self.off[one] ** 2 for one in plans if one not in self.refused}
        return found | {one: self.closely.get(one, self.roughly[one]) for one in known if one in found}

    def _losses(
        self, what: str, plans: Mapping[Segment, FusionPlan], batches: int | None, advance: Callable[[int], None]
    ) -> dict[Segment, float]:
        """Increases [nats per token] on the first batches, or on all."""
        found = {}
        for one, plan in plans.items():
            loss = self._measured(what, plan, partial(self.meter.increase, plan, one.first, batches))
            if loss is None or not math.isfinite(loss):
                self.refused[one] = f"with layers {one.first} to {one.last} changed the loss is not finite"
            else:
                found[one] = loss
            advance(1)
        return found

    def _measured(self, what: str, plan: FusionPlan, measure: Callable[[], float | None]) -> float | None:
        key = f"{what} {plan_key(plan)}"
        if key not in self._known:
            found = measure()
            if found is not None and not math.isfinite(found):
                return found  # no JSON, and not worth keeping
            self._known[key] = found
            self.store.changed()
        found = self._known[key]
        if found is None or isinstance(found, float):
            return found
        raise self.store.broken(f"{key}: {found!r}")


def steps(count: int) -> int:
    """Measurements of so many windows, of all kinds."""
    return count + _part(count, 2) + _part(count, 4)


def _part(count: int, of: int) -> int:
    return max(_CLOSELY, -(-count // of))
