"""make_plan and sweep: from arguments to a plan, over roads and by latency; and what cannot be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxfusion.analysis.meter import PlanMeter
from fxfusion.cost.simulate import simulate
from fxfusion.errors import OptionError, PlanError
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.make_plan import make_plan
from fxfusion.planning.price import Price, depth_price, merged, predicted_latency, table_of_model
from fxfusion.planning.scores import Screen
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


def _costs(model: TinyLm, layers: int, roads: Sequence[str]) -> dict[FusionPlan, float]:
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
        ({"roads": ["hoist"], "max_kl": 1.0, "hardware": "h100"}, "TinyLm has no config"),
        ({"max_kl": 1.0, "hardware": "h100"}, "TinyLm has no config"),
        ({"roads": ["hoist"], "after_refit": True, "target_depth": 3}, "two batches at least"),
        ({"roads": ["hoist"]}, "roads: they need a budget"),
    ],
)
def test_what_cannot_be_asked_of_this_model(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        make_plan(TinyLm(LAYERS), BATCHES[:1], **arguments)


def test_a_budget_that_no_plan_keeps_says_what_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"at 2 FFNs the best one costs \+"):
        make_plan(TinyLm(LAYERS), BATCHES, roads=["hoist"], target_depth=2, max_kl=1e-9)
    monkeypatch.setattr(Screen, "windows", lambda *_: iter(()))
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
        ({"roads": ["hoist"], "hardware": "h100"}, "TinyLm has no config"),
    ],
)
def test_what_no_sweep_can_be_asked_for(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        sweep(TinyLm(LAYERS), BATCHES, **arguments)


class Configured(TinyLm):
    """The tiny model with a config, so that latency can be predicted."""

    def __init__(self) -> None:
        super().__init__(LAYERS)
        sizes = {"num_attention_heads": 4, "vocab_size": 13, "intermediate_size": None}
        fields = {"hidden_size": self.head.in_features} | sizes
        self.config = SimpleNamespace(to_dict=lambda: fields)


@pytest.fixture(scope="module")
def configured() -> tuple[PlanMeter, Price]:
    meter = PlanMeter(Configured(), BATCHES)
    return meter, predicted_latency(meter, "h100")


def _every_plan(meter: PlanMeter, price: Price) -> list[tuple[float, float]]:
    """Predicted latency and loss of each plan that drops attention and fuses neighbours."""
    dropping = (plan for plan in all_plans(LAYERS, ["drop"]))
    return [(price.of(plan), float(meter.quality(plan).loss_increase or 0.0)) for plan in dropping]


@pytest.mark.slow
@pytest.mark.parametrize("roads", [None, ["drop"]])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_at_a_latency_the_loss_is_low_with_roads_and_without(
    configured: tuple[PlanMeter, Price], roads: list[str] | None, share: float
) -> None:
    meter, price = configured
    most = price.of(FusionPlan()) * share
    plan = make_plan(meter.model, BATCHES, roads=roads, max_latency=most, hardware="h100")
    assert price.of(plan) <= most and plan.quality is not None and plan.quality.loss_increase is not None
    rivals = sorted(loss for latency, loss in _every_plan(meter, price) if latency <= most)
    assert plan.quality.loss_increase <= rivals[len(rivals) // 4] < rivals[-1], "among the best, and others are worse"


@pytest.mark.slow
def test_within_a_quality_the_latency_is_low_without_roads(configured: tuple[PlanMeter, Price]) -> None:
    meter, price = configured
    loose, tight = (make_plan(meter.model, BATCHES, max_kl=kl, hardware="h100") for kl in (1e9, 1e-9))
    assert price.of(loose) == min(latency for latency, _ in _every_plan(meter, price)), "everything dropped and fused"
    assert tight.groups == () and tight.dropped_attention == ()
    by_depth = make_plan(meter.model, BATCHES, max_kl=1e9)
    assert price.of(loose) <= price.of(by_depth)


@pytest.mark.slow
def test_a_latency_that_no_plan_has_says_what_can_be_had(configured: tuple[PlanMeter, Price]) -> None:
    meter, price = configured
    least = min(latency for latency, _ in _every_plan(meter, price))
    with pytest.raises(PlanError, match=rf"no plan fits the budget; .*: {least:.4g} to .* ms"):
        make_plan(meter.model, BATCHES, max_latency=least * 0.9, hardware="h100")
    kept = make_plan(meter.model, BATCHES, dropped_attention=[2], max_latency=1e9, hardware="h100")
    assert kept.dropped_attention == (2,) and kept.groups == (), "what is asked for is reached without fusing"
