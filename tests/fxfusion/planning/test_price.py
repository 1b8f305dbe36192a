"""What is to be low: tables of real models, predicted latency of plans, a second front of a sweep."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxfusion.analysis.meter import PlanMeter
from fxfusion.cost import Workload, read_table, simulate
from fxfusion.cost.layer_table import Layer
from fxfusion.errors import OptionError
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.chains import ChainSearch
from fxfusion.planning.make_plan import make_plan
from fxfusion.planning.price import depth_price, latency_price, merged, predicted_latency, table_of_model
from fxfusion.planning.sweep import run_sweep, sweep
from tests.tiny_lm import TinyLm, ids

BATCHES = [ids(3, 9, seed=5)]
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 13, "intermediate_size": None}
WORK = Workload(precision="bf16")


class Configured(TinyLm):
    """The tiny model with what a config says of it."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(4)
        fields = SIZES | {"hidden_size": self.head.in_features} | changes
        self.config = SimpleNamespace(to_dict=lambda: fields)


def test_the_table_of_a_model_is_that_of_its_config(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    found = table_of_model(model, TracedModel(model).graph(torch.zeros(1, 8, dtype=torch.long, device="meta")))
    config.save_pretrained(tmp_path)
    by_config = read_table(tmp_path)
    assert found == by_config.model_copy(update={"name": found.name, "source": ""})


def test_plain_ffns_are_told_from_gated_ones() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=32)).eval()
    found = table_of_model(model, TracedModel(model).graph(torch.zeros(1, 8, dtype=torch.long)))
    assert not found.gated and found.layers == (Layer(has_mixer=True, ffn_width=128),) * 2


def test_a_model_without_a_config_has_no_table() -> None:
    with pytest.raises(OptionError, match="TinyLm has no config: how many heads"):
        predicted_latency(PlanMeter(TinyLm(2), BATCHES), "h100")


def test_latency_of_plans() -> None:
    table = read_table("nemotron-super-49b")
    plans = [
        FusionPlan(),
        FusionPlan(groups=[range(53, 70)]),
        FusionPlan(groups=[range(53, 70)], dropped_attention=[3]),
    ]
    latency = predicted_latency(PlanMeter(TinyLm(2), BATCHES), "h100", table=table).of
    found = [latency(plan) for plan in plans]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3
    with pytest.raises(OptionError, match="layer 99 does not exist"):
        latency(FusionPlan(dropped_attention=[99]))


def test_a_sweep_with_latencies_has_a_second_front(tmp_path: Path) -> None:
    meter = PlanMeter(Configured(), BATCHES)
    latency = predicted_latency(meter, "h100", workload=WORK).of
    found = run_sweep(ChainSearch(judge=meter, price=depth_price(meter.ffns)), (0, 2), latency)
    for point in found.points:
        assert point.latency_ms == latency(point.measured.plan)
        beaten = any(
            (other.latency_ms or 0) <= point.latency_ms and other.measured.cost < point.measured.cost
            for other in found.points
        )
        assert not (point.on_latency_front and beaten)
    assert any(point.on_latency_front for point in found.points)
    with found.to_csv(tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["latency_ms"]) for row in rows] == pytest.approx(
        [point.latency_ms for point in found.points], rel=1e-5
    )
    assert "predicted latency" in found.plot(tmp_path / "sweep.svg").read_text()
    assert found.to_dict()["points"][0]["latency_ms"] == found.points[0].latency_ms


def test_a_sweep_takes_a_device_and_a_plan_keeps_its_quality(tmp_path: Path) -> None:
    model = Configured()
    found = sweep(model, BATCHES, drops=[1], hardware="h100", workload=WORK)
    assert all(point.latency_ms is not None for point in found.points)
    setting = found.to_dict()["predicted_for"]
    assert setting == "h100, tp 1, bf16, batch 1, decode at 1024 tokens"
    assert setting in found.to_csv(tmp_path / "sweep.csv").read_text()
    assert setting in found.plot(tmp_path / "sweep.svg").read_text()
    assert sweep(model, BATCHES, drops=[1]).predicted_for is None
    with pytest.raises(OptionError, match="workload: name the device"):
        sweep(model, BATCHES, drops=[1], workload=WORK)
    plan = make_plan(model, BATCHES, drop=2)
    assert plan.quality is not None and plan.quality.tokens == 3 * 8
    assert plan.quality.perplexity == pytest.approx(float(PlanMeter(model, BATCHES).quality(plan).perplexity), rel=1e-5)
    assert simulate("nemotron-super-49b", plan=plan.replace(groups=[], model=None)).quality == {
        "perplexity": plan.quality.perplexity,
        "loss_increase": plan.quality.loss_increase,
        "kl": plan.quality.kl,
        "top1": plan.quality.top1,
        "tokens": 24,
    }


def test_depth_counts_the_ffns_that_remain() -> None:
    plan = FusionPlan(groups=[[1, 2, 3], {"members": [5, 6], "mixers": "hoist"}], dropped_attention=[2, 3])
    price = depth_price(8)
    assert merged(plan) == 3 and price.of(plan) == 5 and price.of(FusionPlan()) == 8
    assert price.by_depth and price.text(5.0) == "5 FFNs"


def test_latency_is_in_milliseconds() -> None:
    price = latency_price(lambda plan: 2.0 - 0.25 * merged(plan))
    assert price.of(FusionPlan(groups=[[1, 2]])) == 1.75 and price.text(1.75) == "1.75 ms" and not price.by_depth
