"""What the layout cannot say is refused, by the name of the module, tensor or setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fxfusion.checkpoints.nemotron_nas.export import plan_export, save
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints.nemotron_models import (
    HIDDEN,
    decoder,
    randomised,
    settings,
    without_attention,
)

FAMILIES = [
    ("qwen3", {"head_dim": 16}, r"no q/k norm .*\(model.layers.0.self_attn.q_norm.weight \[16\]\)"),
    ("olmo2", {}, "no q/k norm"),
    ("gpt_neox", {}, r"no bias in norms, they are RMSNorms \(gpt_neox.layers.0.input_layernorm.bias \[64\]\)"),
    ("starcoder2", {}, "no bias in norms"),
    ("cohere", {}, "has ffn, but no post_attention_layernorm"),
    ("olmo", {}, "has attention, but no input_layernorm"),
    ("gemma", {"head_dim": 16}, r"model.norm \(GemmaRMSNorm\) computes something else"),
    ("gemma2", {"head_dim": 16}, "no such norm, .*pre_feedforward_layernorm"),
    ("mixtral", {"num_local_experts": 3}, "no experts"),
    ("granite", {"residual_multiplier": 0.22}, "no such factor: config.residual_multiplier = 0.22"),
    ("granite", {"logits_scaling": 8.0}, "no such factor: config.logits_scaling = 8.0"),
    ("smollm3", {}, "no_rope_layers leaves out layer 3"),
    ("glm", {"head_dim": 16}, r"rotates 0.5 of each \(partial_rotary_factor\)"),
    ("mistral", {"sliding_window": 16}, r"no sliding window \(config.sliding_window = 16\)"),
    ("phi3", {"sliding_window": 16}, "no sliding window"),
    ("phi3", {"partial_rotary_factor": 0.5}, "rotates 0.5 of each"),
    ("llama", {"hidden_act": "gelu"}, "model.layers.0.mlp computes something else"),
    ("llama", {"head_dim": 32}, "head_dim = hidden / heads; here it is 32, not 64 / 4"),
]


@pytest.mark.parametrize(("family", "others", "reason"), FAMILIES)
def test_families_that_do_not_fit(family: str, others: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """With weights, and without."""
    config = AutoConfig.for_model(family, **settings(**{"sliding_window": None, "use_cache": False, **others}))
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    for model in (outline, randomised(AutoModelForCausalLM.from_config(config))):
        with pytest.raises(CheckpointError, match=reason):
            save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


class ScaledHead(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


def scaled_logits(model: Any) -> None:
    head = ScaledHead(HIDDEN, 101, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def scaled_branch(model: Any) -> None:
    layer = model.model.layers[1]
    layer.self_attn.register_forward_hook(lambda module, args, output: (output[0] * 1.01, output[1]))


@pytest.mark.parametrize("hide", [scaled_logits, scaled_branch])
def test_what_no_tensor_and_no_setting_shows_is_seen_in_the_logits(hide: Callable[[Any], None]) -> None:
    model = decoder()
    hide(model)
    with pytest.raises(CheckpointError, match="logits are off by .* LlamaForCausalLM computes something"):
        plan_export(model)
    assert plan_export(model, check=False).proof == "not checked"


def no_first_attention(model: Any) -> None:
    without_attention(model, (0, 3))


def other_kv_heads(model: Any) -> None:
    attention = model.model.layers[2].self_attn
    attention.k_proj, attention.v_proj = (nn.Linear(HIDDEN, 16, bias=False) for _ in range(2))


def odd_heads(model: Any) -> None:
    model.model.layers[2].self_attn.k_proj = nn.Linear(HIDDEN, 24, bias=False)


def other_eps(model: Any) -> None:
    model.model.layers[4].post_attention_layernorm.variance_epsilon = 1e-3


def hidden_eps(model: Any) -> None:
    """The attribute says another eps than what is computed."""
    norm = model.model.layers[4].post_attention_layernorm
    norm.forward = lambda x: norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4)


def half(model: Any) -> None:
    model.model.layers[1].mlp.half()


def inner_bias(model: Any) -> None:
    model.lm_head = nn.Linear(HIDDEN, 101)


def extra_outside(model: Any) -> None:
    model.model.extra = nn.Linear(3, 3)


def another_norm(model: Any) -> None:
    model.model.layers[1].extra_norm = nn.LayerNorm(HIDDEN, bias=False)


def lost_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.Identity()


def lost_up(model: Any) -> None:
    del model.model.layers[1].mlp.up_proj


def transposed(model: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    model.model.layers[1].self_attn.q_proj = Conv1D(HIDDEN, HIDDEN)


def window_in_a_module(model: Any) -> None:
    model.model.layers[1].self_attn.sliding_window = 32


def other_scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.3


def other_types(model: Any) -> None:
    model.config.layer_types = ["full_attention"] * 5 + ["sliding_attention"]


def no_rotation(model: Any) -> None:
    model.config.rope_parameters = None


def two_rotations(model: Any) -> None:
    model.config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}


def quantised(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "none"}


def mismatched(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = nn.Linear(HIDDEN, 240, bias=False)


def subclass(model: Any) -> None:
    class Other(torch.Tensor):
        pass

    weight = model.model.layers[1].mlp.up_proj.weight.data.as_subclass(Other)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)


CHANGES = [
    (no_first_attention, "needs attention in its first layer, for vLLM; model.layers.0 has none"),
    (lambda model: without_attention(model, range(6)), "needs attention in its first layer"),
    (other_kv_heads, "one number of key-value heads, .*layers.0.self_attn has 2, model.layers.2.self_attn has 1"),
    (odd_heads, "layers.2.self_attn does not have 4 heads of 16"),
    (other_eps, "one eps for all norms: model.norm has 1e-06, model.layers.4.post_attention_layernorm has 0.001"),
    (hidden_eps, "model.layers.4.post_attention_layernorm .* computes something else"),
    (
        half,
        r"one dtype: model.embed_tokens.weight is torch.float32, model.layers.1.mlp.gate_proj.weight is torch.float16",
    ),
    (inner_bias, r"no bias in the head \(lm_head.bias\)"),
    (extra_outside, "no place for model.extra.weight"),
    (another_norm, "no such norm, .*model.layers.1.extra_norm.weight"),
    (lost_norm, "model.layers.1 has attention, but no input_layernorm"),
    (lost_up, "model.layers.1.mlp has no up_proj"),
    (transposed, r"no such linear layer, .*\(model.layers.1.self_attn.q_proj.weight"),
    (window_in_a_module, "no sliding window .model.layers.1.self_attn.sliding_window = 32"),
    (other_scaling, "model.layers.1.self_attn.scaling is 0.3"),
    (other_types, "one kind of attention, and config.layer_types has .'sliding_attention'"),
    (no_rotation, "one rotary embedding for all layers; config.rope_parameters is None"),
    (two_rotations, "one rotary embedding for all layers"),
    (quantised, "the model is quantised"),
    (mismatched, r"layers.1.mlp.gate_proj.weight is \[256, 64\], where its layer has \[240, 64\]"),
    (subclass, "model.layers.1.mlp.up_proj.weight is a Other, and only plain tensors are written: fuse and save"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_one_change_is_enough(change: Callable[[Any], None], reason: str) -> None:
    model = decoder()
    change(model)
    with pytest.raises(CheckpointError, match=reason):
        plan_export(model)


def test_a_window_as_long_as_the_positions_is_none() -> None:
    config = AutoConfig.for_model("mistral", **settings(sliding_window=128))
    plan_export(randomised(AutoModelForCausalLM.from_config(config)))


def test_no_decoder_at_all(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    with pytest.raises(CheckpointError, match="Linear is no transformers model"):
        save(nn.Linear(2, 2), tmp_path / "out")
    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    with pytest.raises(CheckpointError, match="decoders only; T5ForConditionalGeneration is an encoder-decoder"):
        save(AutoModelForSeq2SeqLM.from_config(config), tmp_path / "out")


def test_a_model_without_weights_is_not_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings()))
    with pytest.raises(CheckpointError, match="on the meta device"):
        save(model, tmp_path / "out", check=False)
    assert not list(tmp_path.iterdir())
