"""Models without weights: parameters on the meta device, buffers as the real model has them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxfusion.checkpoints import empty_model as module
from fxfusion.checkpoints.empty_model import all_on_meta, config_of, empty_model, outline
from fxfusion.errors import CheckpointError
from tests.end_to_end import families
from tests.end_to_end.family_table import family_named


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt_neo", "opt", "falcon"])
def test_parameters_are_missing_and_buffers_are_real(name: str) -> None:
    model = families.build(family_named(name))
    empty = empty_model(copy.deepcopy(model.config))
    assert all(value.is_meta for value in empty.parameters())
    assert [key for key, _ in empty.named_parameters()] == [key for key, _ in model.named_parameters()]
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(empty.named_buffers()).keys()
    for key, value in empty.named_buffers():
        assert value.dtype == buffers[key].dtype and torch.equal(value, buffers[key])
    assert not empty.training


def test_an_outline_has_nothing_real_and_the_dtype_that_was_asked_for() -> None:
    model = outline(families.build(family_named("llama")).config, torch.bfloat16)
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_modules_made_later_are_real_again() -> None:
    empty_model(families.build(family_named("llama")).config)
    assert not nn.Linear(2, 2).weight.is_meta


def test_all_is_on_meta_inside_and_buffers_come_back_after() -> None:
    model = empty_model(families.build(family_named("llama")).config)
    rotary = model.model.rotary_emb
    before, other = rotary.inv_freq, rotary.original_inv_freq
    with all_on_meta(model):
        assert rotary.inv_freq.is_meta and rotary.original_inv_freq.is_meta
        model.model.norm.register_buffer("weight_like", torch.empty(0, device="meta"), persistent=False)
        rotary.original_inv_freq = torch.ones(3)
    assert rotary.inv_freq is before
    assert rotary.original_inv_freq.tolist() == [1, 1, 1] and other.numel() != 3
    assert not model.model.norm.weight_like.is_meta


def test_buffers_that_a_config_makes_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BUFFER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="buffers of .* bytes, more than 1000"):
        empty_model(families.build(family_named("gpt_neo")).config)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({}, "no model_type None"),
        ({"model_type": "unheard_of"}, "no model_type 'unheard_of'$"),
        ({"model_type": "x", "auto_map": {}}, "code of the folder is never run"),
        ({"model_type": ["llama"]}, "no model_type"),
        ({"model_type": "llama", "quantization_config": {}}, "quantised"),
        ({"model_type": "llama", "fxfusion": {"fused": {}}}, "saved without it; fxfusion.save_pretrained"),
        ({"model_type": "llama", "num_attention_heads": "many"}, "no valid config of a llama model"),
    ],
)
def test_bad_configs_are_named(data: dict[str, object], why: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{why}"):
        config_of(data, "config.json")


def test_a_model_that_writes_no_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no causal language model can be built from the config \(t5\)"):
        outline(config_of({"model_type": "t5"}, "config.json"))


def test_code_that_a_config_names_is_neither_run_nor_fetched() -> None:
    named = {
        "attn_implementation": "org/kernel",
        "_attn_implementation": "org/kernel",
        "auto_map": {"AutoModel": "x.Y"},
    }
    config = config_of({"model_type": "llama", "hidden_size": 32, **named, "rope_parameters": None}, "config.json")
    assert config._attn_implementation is None and config.hidden_size == 32
    assert not hasattr(config, "auto_map")
    inner = config_of({"model_type": "gemma3", "text_config": {"hidden_size": 32, **named}, **named}, "config.json")
    assert inner.text_config._attn_implementation is None and inner.text_config.hidden_size == 32
