"""What windows cost alone, from the intact stream before them: against whole runs, and against eager models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.analysis import window_meter
from fxfusion.analysis.planned import PlannedModel
from fxfusion.analysis.window_meter import WindowMeter
from fxfusion.errors import NotFusedError
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.recovery.own_text import model_of, own_text

PLANS = {
    "drop": FusionPlan(dropped_attention=[2]),
    "fused": FusionPlan(dropped_attention=[2], groups=[[1, 2]]),
    "hoist": FusionPlan(groups=[{"members": [1, 2], "mixers": "hoist"}]),
    "wide": FusionPlan(groups=[{"members": [1, 2], "mixers": "wide"}]),
}
WINDOWS = {"drop": (2, 2), "fused": (1, 2), "hoist": (1, 2), "wide": (1, 2)}


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return TracedModel(model_of())


def text() -> list[Tensor]:
    return own_text()[:2]


@pytest.mark.parametrize("name", PLANS)
def test_the_increase_is_that_of_whole_runs(name: str, traced: TracedModel) -> None:
    meter = WindowMeter(traced, text())
    for batches in (1, None):
        whole = fxfusion.evaluate(PlannedModel(traced, PLANS[name]), text()[:batches], traced.model, resamples=100)
        assert whole.loss_increase is not None
        found = meter.increase(PLANS[name], WINDOWS[name][0], batches)
        assert found == pytest.approx(float(whole.loss_increase), abs=2e-6) and abs(found) > 1e-4


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_the_distance_is_that_of_the_eager_models(name: str, traced: TracedModel) -> None:
    first, last = WINDOWS[name]
    changed = fxfusion.fuse(model_of(), PLANS[name])
    end = last if name in ("drop", "hoist") else first  # where the group's one FFN stands
    errors = []
    for batch in text():
        own, reference = (after(model, layer, batch) for model, layer in ((changed, end), (traced.model, last)))
        errors.append((own - reference).square().sum(-1) / reference.square().sum(-1))
    found = WindowMeter(traced, text()).distance(PLANS[name], first, last)
    assert found == pytest.approx(float(torch.cat(errors).mean().sqrt()), rel=1e-4) and found > 0.01


def after(model: Any, layer: int, ids: Tensor) -> Tensor:
    found: list[Tensor] = []
    layers = model.model.layers
    hook = layers[layer].register_forward_hook(lambda module, given, result: found.append(result))
    model(ids)
    hook.remove()
    return found[0] if isinstance(found[0], Tensor) else found[0][0]


def test_layers_before_the_window_are_not_computed_again() -> None:
    model = model_of()
    meter = WindowMeter(TracedModel(model), text())
    wanted = meter.increase(PLANS["hoist"], 1), meter.distance(PLANS["hoist"], 1, 2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert (meter.increase(PLANS["hoist"], 1), meter.distance(PLANS["hoist"], 1, 2)) == wanted
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.zero_()
    assert meter.distance(PLANS["hoist"], 1, 2) == wanted[1] and meter.increase(PLANS["hoist"], 1) != wanted[0]


@pytest.mark.parametrize("name", ["_KEPT_BYTES", "_acts"])
def test_without_kept_streams_whole_graphs_are_run(
    name: str, traced: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = WindowMeter(traced, text()).increase(PLANS["hoist"], 1)
    monkeypatch.setattr(window_meter, name, 0 if name == "_KEPT_BYTES" else lambda graph: True)
    meter = WindowMeter(traced, text())
    assert meter.increase(PLANS["hoist"], 1) == wanted, "to the bit"
    assert meter.distance(PLANS["hoist"], 1, 2) is None


def test_tokens_that_do_not_count_are_left_out(traced: TracedModel) -> None:
    ids = text()[0]
    mask = torch.ones_like(ids)
    mask[:, -5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    other = {"input_ids": ids.clone(), "attention_mask": mask}
    other["input_ids"][:, -5:] = 3
    one, two = (WindowMeter(traced, [each]) for each in (batch, other))
    plan = PLANS["hoist"]
    assert one.increase(plan, 1) == pytest.approx(two.increase(plan, 1), abs=1e-6)
    assert one.distance(plan, 1, 2) == pytest.approx(two.distance(plan, 1, 2), rel=1e-5)
    assert one.distance(plan, 1, 2) != pytest.approx(WindowMeter(traced, [ids]).distance(plan, 1, 2), rel=1e-5)


def test_a_plan_that_cannot_be_had_is_refused(traced: TracedModel) -> None:
    with pytest.raises(NotFusedError):
        WindowMeter(traced, text()).distance(FusionPlan(groups=[[1, 2]]), 1, 2)


def test_a_model_that_writes_is_run_whole() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of()
            self.register_buffer("calls", torch.zeros(1))
            self.config = self.inner.config

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            self.calls.add_(1)
            return self.inner(input_ids, use_cache=False)

    model = Counting()
    meter = WindowMeter(TracedModel(model), text())
    assert meter.distance(PLANS["hoist"], 1, 2) is None
    assert meter.increase(PLANS["hoist"], 1) == pytest.approx(
        WindowMeter(TracedModel(model_of()), text()).increase(PLANS["hoist"], 1), abs=1e-6
    )
