"""screen: what each window costs alone, and which ones are not worth measuring."""

from __future__ import annotations

import math

import pytest

from fxfusion.analysis.meter import PlanMeter
from fxfusion.errors import OptionError
from fxfusion.planning.partition import Limits
from fxfusion.planning.roads.screen import Screen
from fxfusion.planning.roads.segment import Segment, plan_of
from tests.fxfusion.planning.roads.priced_meter import LAYERS, PricedMeter, loss_of
from tests.fxfusion.recovery.own_text import model_of, own_text


def test_every_window_is_measured_alone() -> None:
    screen = Screen(PricedMeter(), ("drop", "hoist", "wide"), max_window=3)
    screen.run(lambda: math.inf)
    assert len(screen.costs) == LAYERS + 3 * (5 + 4)
    for segment, cost in screen.costs.items():
        assert cost == loss_of(plan_of([segment], range(LAYERS)))
    before = len(screen.meter.asked)  # type: ignore[attr-defined]
    screen.run(lambda: math.inf)
    assert len(screen.meter.asked) == before, "nothing is measured twice"  # type: ignore[attr-defined]


def test_what_is_longer_than_a_hopeless_window_is_not_measured() -> None:
    screen = Screen(PricedMeter(), ("hoist", "wide"), max_window=6)
    screen.run(lambda: 0.006)
    hopeless = [one for one, cost in screen.costs.items() if cost > 0.006]
    assert Segment(0, 1, "hoist") in hopeless, "0.01: all windows over it are left out"
    assert not any(one.first == 0 and one.size > 2 for one in screen.costs)
    assert Segment(0, 2, "wide") not in screen.costs and Segment(3, 5, "hoist") in screen.costs
    free = Screen(PricedMeter(), ("hoist", "wide"), max_window=6)
    free.run(lambda: math.inf)
    assert len(free.costs) > len(screen.costs)


def test_windows_that_cannot_be_had_are_remembered_with_the_reason() -> None:
    screen = Screen(PricedMeter(refused=[(2, 3)]), ("hoist",), max_window=3)
    screen.run(lambda: math.inf)
    assert Segment(2, 3, "hoist") in screen.refused and "window [2, 3]" in screen.refused[Segment(2, 3, "hoist")]
    assert Segment(2, 4, "hoist") not in screen.costs and Segment(3, 5, "hoist") in screen.costs


def test_limits_bind() -> None:
    for limits, allowed in (
        (Limits(max_members=2), [(3, 5), (2, 4)]),
        (Limits(max_width=30), [(3, 5), (2, 4)]),
        (Limits(max_bytes=299), [(3, 5), (2, 4)]),
    ):
        screen = Screen(PricedMeter(), ("hoist",), limits=limits, max_window=3)
        screen.run(lambda: math.inf)
        assert not any((one.first, one.last) in allowed for one in screen.costs) and len(screen.costs) >= 5


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="max_window: expected at least 2 layers, got 1"):
        Screen(PricedMeter(), ("hoist",), max_window=1)
    with pytest.raises(OptionError, match="max_dependency"):
        Screen(PricedMeter(), ("hoist",), limits=Limits(max_dependency=0.1))


def test_windows_that_modules_cannot_hold_are_left_out_where_plans_are_refitted() -> None:
    """The graph can have them: a short run does not show that one attention slides."""
    model = model_of()
    model.model.layers[2].self_attn.sliding_window = 4
    meter = PlanMeter(model, own_text()[:1])
    for in_modules in (True, False):
        screen = Screen(meter, ("hoist", "wide"), max_window=2, in_modules=in_modules)
        screen.run(lambda: float("inf"))
        refused = {Segment(1, 2, "wide"), Segment(2, 3, "wide")} if in_modules else set()
        assert set(screen.refused) == refused and Segment(0, 1, "wide") in screen.costs
        assert all("sliding_window" in words for words in screen.refused.values())
