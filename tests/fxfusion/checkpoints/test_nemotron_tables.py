"""Decoders without weights from published layer tables: explained, planned, fused and exported dry."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import fxfusion
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.checkpoints.nemotron_nas.tables import decoder_of, without_attention_before_fusion
from fxfusion.cost.layer_table import LayerTable, runs
from fxfusion.errors import OptionError
from tests.fxfusion.checkpoints.nemotron_models import ids, randomised

SUPER, ULTRA, BASE = "nemotron-super-49b", "nemotron-ultra-253b", "llama-3.1-405b"
# Groups of the paper's preset: each run of Super-49B without its last FFN.
SUPER_GROUPS = [list(range(42, 51)), list(range(53, 70))]


def small(table: LayerTable) -> LayerTable:
    """The same layers, 32 wide, with 64 channels where the table has the most."""
    layers = [layer.model_copy(update={"ffn_width": layer.ffn_width and 256}) for layer in table.layers]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    return table.model_copy(update={**sizes, "layers": tuple(layers)})


def members(model: Any, **options: Any) -> list[list[int]]:
    tokens = ids(4, 50)[:1].to(next(model.parameters()).device)
    report = fxfusion.explain(model, tokens, use_cache=False, **options)
    return [[int(one.name.split(".")[2]) for one in group.members] for group in report.groups]


def test_the_decoder_has_the_layers_of_the_table() -> None:
    table = LayerTable.published(SUPER)
    decoder = decoder_of(table)
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in decoder.parameters())
    for layer, row in zip(decoder.model.layers, table.layers, strict=True):
        assert layer.has_attention is row.has_mixer
        assert layer.mlp.gate_proj.weight.shape == (row.ffn_width, 8192)
    count = sum(value.numel() for value in decoder.parameters())
    assert count == 49_867_145_216, "as published: 49.9 billion"


def test_padding_is_kept_where_the_table_has_it() -> None:
    decoder = decoder_of(LayerTable.published(ULTRA))
    assert sum(not list(layer.children()) for layer in decoder.model.layers) == 81
    count = sum(value.numel() for value in decoder.parameters())
    assert round(count / 1e9, 1) == 253.4


def test_layers_without_attention_before_fusion() -> None:
    found = without_attention_before_fusion(LayerTable.published(ULTRA))
    assert found == (24, 26, 51, 52, *range(54, 61), 64, *range(66, 116))
    super_table = LayerTable.published(SUPER)
    assert without_attention_before_fusion(super_table) == super_table.without_mixer()


def test_attention_of_a_table_can_be_left_out() -> None:
    decoder = decoder_of(LayerTable.published(BASE), without_attention=(24, 26))
    assert [number for number, layer in enumerate(decoder.model.layers) if not layer.has_attention] == [24, 26]


def test_settings_are_passed_on() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    assert decoder_of(LayerTable.published(SUPER), settings={"rope_parameters": rope}).config.rope_parameters == rope


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"gated": False}, "gated"),
        ({"num_key_value_heads": None}, "key-value heads"),
    ],
)
def test_a_table_that_says_too_little(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        decoder_of(LayerTable.published(SUPER).model_copy(update=change))


def test_numbers_that_are_no_layers_and_widths_that_are_no_multiple() -> None:
    table = LayerTable.published(SUPER)
    with pytest.raises(OptionError, match="there is no layer 80"):
        decoder_of(table, without_attention=[80])
    layers = (table.layers[0].model_copy(update={"ffn_width": 100}), *table.layers[1:])
    with pytest.raises(OptionError, match="the FFN width 100"):
        decoder_of(table.model_copy(update={"layers": layers}))
    with pytest.raises(OptionError, match="slot 3 does not begin at layer 3: original layers 7-8"):
        without_attention_before_fusion(table.model_copy(update={"fused_slots": {3: "original layers 7-8"}}))


@pytest.mark.slow  # 30 s: captures 80 layers
def test_a_small_model_of_the_same_pattern_has_the_same_runs() -> None:
    decoder = decoder_of(small(LayerTable.published(SUPER)))
    small_one = randomised(DeciLMForCausalLM(decoder.config).float())
    assert members(small_one, policy="paper") == SUPER_GROUPS
    table = LayerTable.published(SUPER)
    chains = [[*([] if run.leading is None else [run.leading]), *run.layers] for run in runs(table)]
    assert members(small_one) == chains


MEASURED = """
import json, resource, sys, time
import torch, fxfusion
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.checkpoints.nemotron_nas.tables import decoder_of, without_attention_before_fusion
from fxfusion.cost.layer_table import LayerTable
ultra = LayerTable.published("nemotron-ultra-253b")
gone = without_attention_before_fusion(ultra) if sys.argv[1] == "llama-3.1-405b" else ()
began = time.process_time()
model = decoder_of(LayerTable.published(sys.argv[1]), without_attention=gone)
report = fxfusion.explain(model, torch.zeros(1, 8, dtype=torch.long, device="meta"), policy="paper", use_cache=False)
groups = [[int(one.name.split(".")[2]) for one in group.members] for group in report.groups]
plan = plan_export(model)
print(json.dumps({
    "groups": groups, "engines": plan.engines, "proof": plan.proof, "bytes": plan.nbytes, "tensors": len(plan.tensors),
    "layers": plan.config["num_hidden_layers"], "seconds": time.process_time() - began,
    "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


@pytest.mark.slow  # 30-60 s each: whole depth, in a process of its own
@pytest.mark.parametrize(
    ("name", "groups", "layers"),
    [
        (SUPER, SUPER_GROUPS, 80),
        (BASE, [list(range(54, 60)), list(range(66, 115))], 126),
        (ULTRA, [list(range(100, 106)), [125, 134, 143, 149]], 81),
    ],
)
def test_whole_models_take_a_minute_and_little_memory(name: str, groups: list[list[int]], layers: int) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED, name], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["groups"] == groups and found["layers"] == layers
    assert [engine for engine, why in found["engines"].items() if why is None] == ["transformers", "vllm", "mlx-lm"]
    assert "graphs of one layer of each kind are the same" in found["proof"]
    assert found["seconds"] < 60, "of one processor"
    assert found["resident"] < 4e9


@pytest.mark.slow  # 30 s
def test_super_is_fused_and_exported_without_weights() -> None:
    model = decoder_of(LayerTable.published(SUPER))
    before = sum(value.numel() for value in model.parameters())
    fxfusion.fuse(model, fxfusion.FusionPlan(groups=SUPER_GROUPS))
    plan = plan_export(model)
    mults = [one["ffn"]["ffn_mult"] for one in plan.config["block_configs"]]
    # 107,520 and 87,808 channels, of 9 and of 17 FFNs: published widths summed, not their rounded multipliers.
    assert plan.config["num_hidden_layers"] == 80 - 8 - 16 == len(mults)
    assert [mult for mult in mults if mult > 10] == [19.6875, 16.078125]
    norms = (8 + 16) * 8192
    assert plan.nbytes == 2 * (before - norms)
    assert plan.engines["vllm"] is None
