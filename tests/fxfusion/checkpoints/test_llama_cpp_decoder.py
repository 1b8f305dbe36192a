"""What GGUF's architecture `deci` cannot say is refused by its name, without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fxfusion.checkpoints.llama_cpp.decoder import GgufDecoder, pairs
from fxfusion.checkpoints.llama_cpp.proof import logits_of, prove
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints.nemotron_models import decoder, ids, logits, off, randomised, settings

_ROTATED = {"rope_type": "default", "rope_theta": 1e4}
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3": ({"head_dim": 16}, r"no q/k norm or other norm inside attention \(model.layers.0.self_attn"),
    "gemma": ({"head_dim": 16}, r"norms are RMSNorms|FFN is down\(silu"),
    "granite": ({"logits_scaling": 8.0}, r"no such factor: config.logits_scaling = 8.0"),
    "mistral": ({"sliding_window": 16}, r"no sliding window \(.*sliding_window = 16\)"),
    "stablelm": ({}, r"deci"),
    "phi3": ({"rope_parameters": {**_ROTATED, "partial_rotary_factor": 0.5}}, r"rotates whole heads"),
    "mixtral": ({}, r"no experts"),
    "gpt2": ({"n_embd": 64, "n_head": 4, "n_layer": 2}, r"deci|GGUF"),
}


def built(kind: str, **others: Any) -> Any:
    config = AutoConfig.for_model(kind, **settings(num_hidden_layers=2, **others))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_families_are_refused_by_what_they_have(kind: str) -> None:
    others, why = FOREIGN[kind]
    with pytest.raises(CheckpointError, match=why) as found:
        GgufDecoder.of(built(kind, **others))
    assert "nemotron" not in str(found.value)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "phi3"])
def test_families_that_are_llamas(kind: str) -> None:
    more = {"sliding_window": None, "rope_parameters": _ROTATED} if kind in ("mistral", "phi3") else {}
    config = AutoConfig.for_model(kind, **settings(num_hidden_layers=2, **more))
    model = randomised(AutoModelForCausalLM.from_config(config))
    found = GgufDecoder.of(model)
    assert found.architecture == "llama"
    assert ("blk.0.attn_k.bias" in found.pieces) == (kind == "qwen2")
    assert off(logits_of(found, ids()), logits(model)) < 2e-5


def test_a_setting_that_nobody_knows_is_refused() -> None:
    model = decoder(num_hidden_layers=1)
    model.config.router_jitter = 0.0
    GgufDecoder.of(model)  # neutral
    model.config.attention_sinks = 4
    with pytest.raises(CheckpointError, match=r"no such setting: config.attention_sinks = 4"):
        GgufDecoder.of(model)
    model.config.attention_sinks = True
    with pytest.raises(CheckpointError, match=r"config.attention_sinks = True"):
        GgufDecoder.of(model)


@pytest.mark.slow
def test_what_tensors_do_not_show_is_found_by_the_proof() -> None:
    model = decoder(num_hidden_layers=2)
    assert prove(model, GgufDecoder.of(model)).startswith("logits of 14 tokens compared with the model")
    layer: Any = model.model.layers[0]
    layer.forward = lambda hidden, *rest, own=layer.forward, **more: 1.01 * own(hidden, *rest, **more)
    with pytest.raises(CheckpointError, match="the logits are off by .* LlamaForCausalLM computes something"):
        prove(model, GgufDecoder.of(model))


def test_heads_that_do_not_fit() -> None:
    model = decoder(num_hidden_layers=2)
    model.model.layers[1].self_attn.k_proj.weight = nn.Parameter(torch.zeros(24, 64))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn has 64, 24 and 32 rows of q, k and v"):
        GgufDecoder.of(model)


def test_rows_are_those_of_the_converter() -> None:
    """Two heads of 4 channels: 0 and 2, 1 and 3 rotate together."""
    assert pairs(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
