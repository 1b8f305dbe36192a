"""Layers that a config.json lists one by one, in each schema: what is read, and what stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxfusion.cost import LayerTable, read_table
from fxfusion.cost.layer_forms import KNOWN, LayerForm, layer_forms, unlisted
from fxfusion.cost.layer_table import runs
from fxfusion.errors import OptionError

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}
# As `dataclasses.asdict` of Model-Optimizer's BlockConfig writes them.
NEWER_ATTENTION = {
    "no_op": False,
    "replace_with_linear": False,
    "sparsify": None,
    "weights_precision": "bf16",
    "num_key_value_heads": 2,
    "llama4": None,
    "mamba": None,
}
NEWER_FFN = {
    "no_op": False,
    "replace_with_linear": False,
    "sparsify": None,
    "weights_precision": "bf16",
    "moe": None,
    "intermediate_size": 96,
}


def older(group: int | None, mult: float | None) -> dict[str, Any]:
    """As in the Llama-Nemotron folders, with all their keys."""
    attention = dict.fromkeys(("num_sink_tokens", "sparsify", "window_length"))
    attention |= {"n_heads_in_group": group, "no_op": group is None, "replace_with_linear": False}
    attention |= {"unshifted_sink": False, "use_prefill_window_in_sink_attention": False}
    ffn = {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False, "sparsify": None}
    return {"attention": attention, "ffn": ffn}


def newer(attention: Any = NEWER_ATTENTION, ffn: Any = NEWER_FFN, **others: Any) -> dict[str, Any]:
    return {"attention": attention, "ffn": ffn, "parallel_blocks": None, **others}


def forms(**changes: Any) -> list[tuple[bool, bool, dict[str, Any]]]:
    found = layer_forms(BASE | changes)
    assert found is not None
    return [(form.attention, form.ffn, dict(form.settings)) for form in found]


def test_a_plain_config_lists_nothing() -> None:
    assert layer_forms(BASE) is None
    assert layer_forms(BASE | {"block_configs": None, "per_layer_config": None}) is None


def test_all_schemas_say_the_same() -> None:
    """One table: the second layer without attention, the third without FFN."""
    no_op = {"no_op": True}
    expected = [
        (True, True, {"num_key_value_heads": 2, "intermediate_size": 256}),
        (False, True, {"intermediate_size": 256}),
        (True, False, {"num_key_value_heads": 4}),
    ]
    assert forms(block_configs=[older(4, 6.0), older(None, 6.0), older(2, None)]) == expected
    wide = NEWER_FFN | {"intermediate_size": 256}
    blocks = [newer(ffn=wide), newer(None, wide), newer(NEWER_ATTENTION | {"num_key_value_heads": 4}, no_op)]
    assert forms(block_configs=blocks) == expected
    overrides = {
        "0": {"num_key_value_heads": 2, "intermediate_size": 256},
        "1": {"skip": ["attention"], "intermediate_size": 256},
        "2": {"skip": ["mlp"], "num_key_value_heads": 4},
    }
    assert forms(per_layer_config=overrides) == [*expected[:2], (True, False, {})], "4 is the model's own number"


def test_blocks_behind_a_layer_are_layers_of_their_own() -> None:
    """The form in which fxfusion writes a model for transformers."""
    none = ["argument", 0, None, 0, False]
    returns = {"norm": none, "attn": ["number", None, 2, 0, False], "mlp": ["number", None, None, 0, False]}
    further = {"intermediate_size": 64, "own_parameters": {"mlp.up.bias": [64]}, "skip": ["attn", "norm"]}
    overrides = {"0": {"further": [further, further | {"own_parameters": {}}]}, "2": {"skip": ["mlp", "norm"]}}
    fields = BASE | {"per_layer_config": overrides, "skip_returns": returns, "layer_types": ["a", "b", "c"]}
    found = layer_forms(fields)
    assert found is not None
    assert [form.place for form in found] == ["0", "0.further.0", "0.further.1", "1", "2"]
    assert [(form.attention, form.ffn) for form in found] == [
        (True, True),
        (False, True),
        (False, True),
        (True, True),
        (True, False),
    ]
    assert found[1].own == {"mlp.up.bias": [64]} and found[1].settings == {"intermediate_size": 64}
    plain = unlisted(fields, found)
    assert plain["num_hidden_layers"] == 5 and plain["layer_types"] == ["a", "a", "a", "b", "c"]
    assert not {"per_layer_config", "skip_returns"} & plain.keys()


def test_the_table_reads_itself() -> None:
    found = layer_forms(BASE | {"block_configs": [older(4, 6.0), older(None, 6.0), older(2, None)]})
    assert found is not None
    entries = json.loads(json.dumps([form.to_dict() for form in found]))
    assert layer_forms(BASE | {KNOWN: entries}) == found
    with pytest.raises(OptionError, match="fxfusion_layers cannot be read"):
        layer_forms(BASE | {KNOWN: [{"mamba": 3}]})


def test_a_null_takes_what_layers_say() -> None:
    found = [LayerForm(place="0", ffn=False), LayerForm(place="1", settings={"intermediate_size": 96})]
    assert unlisted(BASE | {"intermediate_size": None}, found)["intermediate_size"] == 96
    found = [LayerForm(place="0"), *found[1:]]
    assert unlisted(BASE | {"intermediate_size": None}, found)["intermediate_size"] is None, "it means something there"


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (
            newer(NEWER_ATTENTION | {"replace_with_linear": True}),
            "attention.replace_with_linear = True",
        ),
        (newer(ffn=NEWER_FFN | {"replace_with_linear": True}), "ffn.replace_with_linear = True"),
        (newer(ffn=NEWER_FFN | {"moe": {"num_local_experts": 8}}), "ffn.moe = "),
        (newer(NEWER_ATTENTION | {"mamba": {"state_dim": 8}}), "attention.mamba = "),
        (newer(NEWER_ATTENTION | {"llama4": {"use_rope": False}}), "attention.llama4 = "),
        (newer(NEWER_ATTENTION | {"sparsify": ["q"]}), "attention.sparsify = "),
        (newer(NEWER_ATTENTION | {"window_length": 8}), "attention.window_length = 8"),
        (newer(NEWER_ATTENTION | {"num_sink_tokens": 8}), "attention.num_sink_tokens = 8"),
        (newer(NEWER_ATTENTION | {"qk_norm": True}), "attention.qk_norm = True"),
        (newer(ffn=NEWER_FFN | {"flavour": "sweet"}), "ffn.flavour = 'sweet'"),
        (newer(ffn=NEWER_FFN | {"hidden_act": "gelu"}), "ffn.hidden_act = 'gelu' is not the model's 'silu'"),
        (newer(ffn=NEWER_FFN | {"weights_precision": "nvfp4"}), "ffn.weights_precision = 'nvfp4'"),
        (newer(parallel_blocks=[newer()]), "parallel_blocks = "),
        (newer(colour="red"), "colour = 'red'"),
        (newer(NEWER_ATTENTION | {"no_op": True, "replace_with_linear": True}), "both no_op and replace_with_linear"),
        (newer(NEWER_ATTENTION | {"no_op": "yes"}), "no_op = 'yes' must be true or false"),
        (newer(NEWER_ATTENTION | {"num_key_value_heads": 3}), "num_key_value_heads = 3 must divide the 8"),
        (newer(NEWER_ATTENTION | {"n_heads_in_group": 2}), "num_key_value_heads = 2 .* and n_heads_in_group = 2"),
        (newer({"no_op": False}), "n_heads_in_group = None, and no num_key_value_heads"),
        (newer(ffn={"no_op": False}), "ffn_mult = None, and no intermediate_size"),
        (newer(ffn=NEWER_FFN | {"ffn_mult": 6.0}), "intermediate_size = 96, and ffn_mult = 6.0 says 256"),
        (newer(ffn=NEWER_FFN | {"intermediate_size": 0}), "intermediate_size = 0"),
        (newer(attention=7), "attention: expected fields"),
        ({"ffn": NEWER_FFN}, "must be"),
        ("full", "must be"),
    ],
)
def test_a_block_that_is_not_understood(block: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=rf"block_configs\[1\].*{reason}"):
        layer_forms(BASE | {"block_configs": [newer(), block, newer()]})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_configs": {}}, "block_configs: expected a list"),
        ({"block_configs": [newer()]}, "block_configs has 1 entries for num_hidden_layers = 3"),
        ({"block_configs": [newer()] * 3, "per_layer_config": {}}, "block_configs and per_layer_config both say"),
        ({"subblock_configs": [{}]}, "subblock_configs is not supported"),
        ({"parallel_blocks": [newer()]}, "parallel_blocks is not supported"),
        ({"per_layer_config": []}, "per_layer_config: expected overrides by layer"),
        ({"per_layer_config": {"3": {}}}, "'3' is none of the 3 layers"),
        ({"per_layer_config": {"1": 7}}, "per_layer_config.1: expected fields"),
        ({"per_layer_config": {"1": {"skip": ["norm"]}}}, "per_layer_config.1.skip: 'norm' is not supported"),
        ({"per_layer_config": {"1": {"skip": "mlp"}}}, "per_layer_config.1.skip: expected a list"),
        ({"per_layer_config": {"1": {"sliding_window": 8}}}, "per_layer_config.1.sliding_window = 8"),
        ({"per_layer_config": {"1": {"further": [{}]}}}, "per_layer_config.1.further = "),
        ({"per_layer_config": {"1": {"own_parameters": {"a": [1]}}}}, "per_layer_config.1.own_parameters = "),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}, "skip_returns": {}}, "skip: 'mlp' is not supported"),
    ],
)
def test_a_config_that_is_not_understood(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        layer_forms(BASE | changes)


def published(kind: str) -> tuple[LayerTable, dict[str, Any]]:
    """The table that comes with the package, and a config.json that says it, by this script."""
    table = LayerTable.published(kind)
    heads, kv_heads = table.num_attention_heads or 0, table.num_key_value_heads or 1
    group, hidden = heads // kv_heads, table.hidden_size
    blocks = [
        older(group if one.has_mixer else None, 1.5 * one.ffn_width / hidden if one.ffn_width else None)
        for one in table.layers
    ]
    sizes = {"hidden_size": table.hidden_size, "num_attention_heads": heads, "vocab_size": table.vocab_size}
    nulls = {"num_key_value_heads": None, "intermediate_size": None}
    layers = {"num_hidden_layers": len(blocks), "block_configs": blocks}
    return table, {**sizes, **nulls, **layers, "model_type": "nemotron-nas", "hidden_act": "silu"}


@pytest.mark.parametrize("name", ["nemotron-super-49b", "nemotron-ultra-253b"])
def test_published_models(name: str, tmp_path: Path) -> None:
    table, fields = published(name)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = read_table(tmp_path)
    assert [(one.has_mixer, one.ffn_width) for one in found.layers] == [
        (one.has_mixer, one.ffn_width) for one in table.layers
    ]
    assert {one.num_key_value_heads for one in found.layers if one.has_mixer} == {8}
    assert [run.layers for run in runs(found)] == [run.layers for run in runs(table)]
    if name == "nemotron-super-49b":
        assert {10, 18} <= {len(run.layers) for run in runs(found)}
