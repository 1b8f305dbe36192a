"""The loss of windows alone, and of plans after their refit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import evaluate
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning import scores as module
from fxfusion.planning.budget import Limits
from fxfusion.planning.roads import plan_of
from fxfusion.planning.roads.road import Segment
from fxfusion.planning.scores import RefitMeter, Screen, divided, first, screened
from fxfusion.recovery.refit import refit
from tests.fxfusion.planning.priced_meter import LAYERS, PricedMeter, loss_of
from tests.fxfusion.recovery.own_text import PLAN, model_of, own_text


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


def test_text_is_divided_between_fitting_and_judging() -> None:
    batches = [torch.zeros(2, 512, dtype=torch.long) + number for number in range(40)]
    fitted, judged = divided(batches)
    assert [int(batch[0, 0]) for batch in judged] == [0, 1, 2, 3], "4,096 tokens are enough to judge"
    assert [int(batch[0, 0]) for batch in fitted] == list(range(4, 12)), "and 8,192 to fit to"
    few_fitted, few_judged = divided([{"input_ids": batch} for batch in batches[:5]])
    assert len(few_judged) == 1 and len(few_fitted) == 4
    assert len(screened(judged)) == 2 and len(first(batches, 1)) == 1
    with pytest.raises(OptionError, match="two batches at least"):
        divided(batches[:1])


def test_a_plan_is_judged_after_its_refit_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = model_of(), own_text()
    judged, fitted = list(text[:2]), list(text[2:])
    plan = FusionPlan(**PLAN)
    meter = PlanMeter(model, judged)
    refitted = RefitMeter(meter, fitted, tmp_path)
    found = refitted.quality(plan)
    expected = evaluate(refit(model, plan, fitted, reference="intact"), judged, model)
    assert float(found.loss) == pytest.approx(float(expected.loss), abs=1e-6)
    assert abs(float(found.loss) - float(meter.quality(plan).loss)) > 1e-5, "a refit changes it"
    assert refitted.quality(FusionPlan()).loss_increase == meter.quality(FusionPlan()).loss_increase

    monkeypatch.setattr(module, "refit", lambda *_, **__: pytest.fail("it was refitted again"))
    again = RefitMeter(meter, fitted, tmp_path)
    assert again.knows(plan) and again.quality(plan) == found
    with pytest.raises(pytest.fail.Exception):
        again.quality(FusionPlan(dropped_attention=[2], groups=[[1, 2]]))
    with pytest.raises(OptionError, match=r"another measurement \(fitted is"):
        RefitMeter(meter, fitted[1:], tmp_path)
