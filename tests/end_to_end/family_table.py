"""The families of transformers that are tested, as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.end_to_end.families import Family

FLOAT32 = 1e-6
"""For models that apply a norm's gain in float32: folding it moves them by about 5e-8."""

FAST = (
    Family(name="llama"),
    Family(name="mistral"),
    Family(name="qwen2"),
    Family(name="qwen3"),
    Family(name="smollm3", config={"mlp_bias": True, "attention_bias": True}),
    Family(name="gemma", limit=FLOAT32),
    Family(name="phi3", stub="zeros"),
    Family(name="glm", config={"head_dim": 8}),
    Family(name="granite", config={"residual_multiplier": 0.22}),
    Family(name="olmo"),
    Family(name="starcoder2"),
    Family(name="gpt2", layers="transformer.h", mixers=("attn",), norms=("ln_1",), ffn_norm="ln_2"),
    Family(
        name="gpt_neo",
        layers="transformer.h",
        mixers=("attn",),
        norms=("ln_1",),
        ffn_norm="ln_2",
        config={"attention_types": [[["global", "local"], 2]]},
    ),
    Family(
        name="gpt_neox",
        layers="gpt_neox.layers",
        mixers=("attention",),
        stub="zeros",
    ),
    Family(
        name="opt",
        layers="model.decoder.layers",
        stub="zeros",
        norms=("self_attn_layer_norm",),
        ffn_norm="final_layer_norm",
        config={"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    Family(name="cohere", limit=FLOAT32, norms=(), ffn_norm="input_layernorm"),
    Family(name="nemotron"),
    Family(
        name="falcon",
        layers="transformer.h",
        mixers=("self_attention",),
        norms=(),
        ffn_norm="input_layernorm",
        config={"ffn_hidden_size": 48, "bias": True},
    ),
    Family(name="stablelm"),
)

POST = {"norms": ("post_attention_layernorm",), "ffn_norm": ""}
SANDWICH = {
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "ffn_norm": "pre_feedforward_layernorm",
    "limit": FLOAT32,
}
OUTPUT_NORM = (
    Family(name="olmo2", **POST),
    Family(name="gemma2", config={"head_dim": 8}, **SANDWICH),
    Family(name="glm4", norms=("input_layernorm", "post_self_attn_layernorm"), config={"head_dim": 8}),
)
OUTPUT_NORM_SLOW = (
    Family(name="olmo3", **POST),
    Family(name="exaone4", **POST),
    Family(name="gemma3_text", config={"head_dim": 8}, **SANDWICH),
    Family(
        name="lfm3",
        norms=("operator_norm", "post_operator_norm"),
        ffn_norm="ffn_norm",
        config={"layer_types": ["full_attention"] * 4},
    ),
)
"""Each FFN has a norm on its output, with or without one before it."""

INNER = (Family(name="bitnet"),)
"""A norm over the intermediate channels."""

PER_CHANNEL = (Family(name="apertus", norms=("attention_layernorm",), ffn_norm="feedforward_layernorm"),)
"""Learned numbers in the activation."""

VARIANTS = (
    Family(
        name="gpt_neox",
        variant="sequential",
        layers="gpt_neox.layers",
        mixers=("attention",),
        stub="zeros",
        config={"use_parallel_residual": False},
    ),
    Family(
        name="falcon",
        variant="two-norms",
        layers="transformer.h",
        mixers=("self_attention",),
        norms=("ln_attn",),
        ffn_norm="ln_mlp",
        config={"ffn_hidden_size": 48, "new_decoder_architecture": True},
    ),
    Family(
        name="stablelm",
        variant="parallel",
        norms=(),
        ffn_norm="input_layernorm",
        config={"use_parallel_residual": True},
    ),
)

LEADING = ("llama", "opt")
LEADING_SLOW = ("gpt2", "phi3", "gemma", "gpt_neox-sequential")
LAST_NORM = ("gemma", "gemma2")
LAST_NORM_SLOW = ("starcoder2", "cohere", "falcon-two-norms")

REFUSED = (
    Family(
        name="bert",
        kind="encoder",
        layers="encoder.layer",
        mixers=("attention",),
        stub="same",
        norms=(),
        fused=0,
        refused="post_norm",
    ),
    Family(
        name="mixtral",
        dtype=torch.float32,  # the experts' kernel has no float64
        config={"num_local_experts": 3},
        fused=0,
        refused="router",
    ),
)


ALL = (*FAST, *VARIANTS, *OUTPUT_NORM, *OUTPUT_NORM_SLOW, *INNER, *PER_CHANNEL, *REFUSED)


def family_named(id_: str) -> Family:
    return next(family for family in ALL if family.id == id_)


def named(ids: Sequence[str]) -> list[Family]:
    return [family_named(id_) for id_ in ids]


def each(fast: Sequence[Family], slow: Sequence[Family] = ()) -> Any:
    """One test for each family; `slow` ones only in `make test-slow`."""
    cases = [pytest.param(family, id=family.id) for family in fast]
    cases += [pytest.param(family, id=family.id, marks=pytest.mark.slow) for family in slow]
    return pytest.mark.parametrize("family", cases)
