"""after_refit: plans are judged by the loss that their refit leaves, on text that it did not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import evaluate
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.roads import after_refit as module
from fxfusion.planning.roads.after_refit import RefitMeter, divided, first, screened
from fxfusion.recovery.refit import refit
from tests.fxfusion.recovery.own_text import PLAN, model_of, own_text


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
