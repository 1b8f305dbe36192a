"""choose: from arguments to a plan, on real models; and what cannot be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fxfusion.analysis.meter import PlanMeter
from fxfusion.cost.simulate import simulate
from fxfusion.errors import OptionError, PlanError
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning import scores as screen_file
from fxfusion.planning.make_plan import make_plan
from fxfusion.planning.price import depth_price, merged, predicted_latency, table_of_model
from fxfusion.planning.scores import Road
from fxfusion.planning.sweep import sweep
from tests.fxfusion.planning.priced_meter import all_plans
from tests.fxfusion.recovery.own_text import model_of, own_text
from tests.tiny_lm import TinyLm, ids

BATCHES = [ids(3, 9, seed=5), ids(3, 9, seed=6)]
LAYERS = 4


def test_of_all_plans_at_a_depth_the_one_measured_best_is_made() -> None:
    model = TinyLm(LAYERS)
    plan = make_plan(model, BATCHES, roads=["hoist"], target_depth=2)
    costs = _costs(model, LAYERS, ["hoist"])
    ranked = sorted(costs.values())
    assert LAYERS - merged(plan) <= 2 and plan.model is not None and plan.model.layers == LAYERS
    assert plan.made_by is not None
    assert costs[_bare(plan)] <= ranked[len(ranked) // 4] < ranked[-1], "among the best, and there are worse ones"


def test_roads_together_cost_no_more_than_the_best_of_them_alone() -> None:
    model, roads = TinyLm(3), ("drop", "hoist")
    costs = _costs(model, 3, roads)
    both = costs[_bare(make_plan(model, BATCHES, roads=roads, target_depth=2))]
    alone = [costs[_bare(make_plan(model, BATCHES, roads=[road], target_depth=2))] for road in roads]
    assert both <= min(alone) < max(alone)


def _bare(plan: FusionPlan) -> FusionPlan:
    return FusionPlan(groups=plan.groups, dropped_attention=plan.dropped_attention)


def _costs(model: TinyLm, layers: int, roads: Sequence[Road]) -> dict[FusionPlan, float]:
    """The loss of every plan that leaves two FFNs at most."""
    meter = PlanMeter(model, BATCHES)
    plans = (plan for plan in all_plans(layers, roads) if depth_price(layers).of(plan) <= 2)
    return {plan: float(meter.quality(plan).loss) for plan in plans}


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"roads": ["hoist"], "target_depth": 3, "cache": tmp_path}
    first = make_plan(TinyLm(LAYERS), BATCHES, **arguments)
    from fxfusion.analysis import meter

    monkeypatch.setattr(meter, "evaluate", lambda *_, **__: pytest.fail("a plan was measured again"))
    assert make_plan(TinyLm(LAYERS), BATCHES, **arguments).groups == first.groups
    with pytest.raises(pytest.fail.Exception):
        make_plan(TinyLm(LAYERS), BATCHES, **{**arguments, "roads": ["drop"]})


@pytest.mark.slow
def test_automatic_is_the_least_latency_within_a_percent_of_the_perplexity() -> None:
    model, text = model_of(), own_text()
    arguments: dict[str, Any] = {"preset": "automatic", "max_window": 2}
    plan = make_plan(model, text, **arguments)
    loose = make_plan(model, text, **arguments, max_perplexity_increase=1e9)
    price = predicted_latency(PlanMeter(model, text[:1]), "h100")
    assert price.of(loose) < price.of(FusionPlan()) and price.of(loose) <= price.of(plan)
    assert loose.groups
    assert plan.quality is not None and plan.quality.loss_increase is not None
    assert plan.quality.loss_increase <= math.log(1.01)


def test_latency_is_that_of_the_cost_model() -> None:
    model = model_of()
    meter = PlanMeter(model, own_text()[:1])
    table = table_of_model(model, meter.graph)
    assert len(table.layers) == 4 and table.gated and table.hidden_size == model.config.hidden_size
    price, plan = predicted_latency(meter, "h100"), FusionPlan(groups=[[1, 2]], hoist=True)
    assert price.of(plan) == simulate(table, hardware="h100", plan=plan).latency_ms < price.of(FusionPlan())
    plain = PlanMeter(model_of("gpt2"), own_text("gpt2")[:1])
    assert not table_of_model(plain.model, plain.graph).gated


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"roads": ["hoist"]}, "roads need a budget"),
        ({"roads": ["raise"], "target_depth": 3}, "expected some of drop, hoist, wide"),
        ({"roads": ["hoist"], "target_depth": 3, "drop": 2}, "drop: over several roads"),
        ({"roads": ["hoist"], "target_depth": 3, "dropped_attention": [1]}, "dropped_attention and splits"),
        ({"roads": ["hoist"], "max_latency": 1.0}, "max_latency: name the hardware"),
        ({"roads": ["hoist"], "max_latency": -1.0, "hardware": "h100"}, "max_latency: expected milliseconds"),
        (
            {"roads": ["hoist"], "max_latency": 1.0, "hardware": "h100", "target_depth": 2},
            "target_depth and max_latency",
        ),
        ({"roads": ["hoist"], "max_kl": 1.0, "hardware": "h100"}, "TinyLm has no config"),
        ({"roads": ["hoist"], "target_depth": 3, "max_dependency": 0.1}, "max_dependency"),
        ({"roads": ["hoist"], "target_depth": 3, "max_window": 1}, "max_window"),
        ({"after_refit": True, "target_depth": 3}, "after_refit: goes with roads"),
        ({"hardware": "h100"}, "hardware: goes with roads"),
        ({"roads": ["hoist"], "after_refit": True, "target_depth": 3, "batches": BATCHES[:1]}, "two batches at least"),
    ],
)
def test_what_cannot_be_asked_for(arguments: dict[str, Any], named: str) -> None:
    batches = arguments.pop("batches", BATCHES)
    with pytest.raises(OptionError, match=named):
        make_plan(TinyLm(LAYERS), batches, **arguments)


def test_a_budget_that_no_plan_keeps_says_what_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"at 2 FFNs the best one costs \+"):
        make_plan(TinyLm(LAYERS), BATCHES, roads=["hoist"], target_depth=2, max_kl=1e-9)
    monkeypatch.setattr(screen_file, "windows", lambda *_: iter(()))
    with pytest.raises(PlanError, match="no plan reaches 2 FFNs; the windows that can be had reach 4 FFNs"):
        make_plan(TinyLm(LAYERS), BATCHES, roads=["hoist"], target_depth=2)


@pytest.mark.slow
def test_wide_blocks_are_judged_after_their_refit() -> None:
    model = model_of()
    plan = make_plan(model, own_text(), roads=["wide"], after_refit=True, target_depth=3)
    assert [group.mixers for group in plan.groups] == ["wide"] and not plan.dropped_attention
    assert len(fuse(model, plan).model.layers) == 3


def test_a_sweep_over_roads_has_the_best_plan_at_every_depth(tmp_path: Path) -> None:
    model = TinyLm(LAYERS)
    found = sweep(model, BATCHES, roads=["hoist"], cache=tmp_path)
    depths = [point.measured.depth for point in found.points]
    assert depths == sorted(set(depths)) and depths[0] == 1 and depths[-1] == LAYERS == found.intact
    assert found.points[-1].measured.plan.groups == () and found.front
    for point in found.points[:-1]:
        assert point.measured.fused_bytes > 0 and {group.mixers for group in point.measured.plan.groups} == {"hoist"}
    made = make_plan(model, BATCHES, roads=["hoist"], target_depth=2, cache=tmp_path)
    assert made.quality is not None and made.quality.loss_increase is not None
    least = min(point.measured.cost for point in found.points if point.measured.depth <= 2)
    assert least <= made.quality.loss_increase + 1e-9
    assert len(found.to_csv(tmp_path / "sweep.csv").read_text().splitlines()) == len(found.points) + 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"roads": ["hoist"], "drops": [1]}, "drops: over several roads"),
        ({"after_refit": True}, "after_refit: goes with roads"),
        ({"max_window": 3}, "max_window: goes with roads"),
        ({"roads": ["hoist"], "hardware": "h100"}, "TinyLm has no config"),
    ],
)
def test_what_no_sweep_can_be_asked_for(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        sweep(TinyLm(LAYERS), BATCHES, **arguments)
