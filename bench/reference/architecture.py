"""The shape of the reference model."""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.reference.data import VOCABULARY


def build_config() -> LlamaConfig:
    """12 layers, hidden 256, 4 heads (2 key-value heads), FFN 640, tied embeddings: 9.3 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        rms_norm_eps=1e-5,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """The reference model with random float32 weights, decided by `seed`."""
    torch.manual_seed(seed)
    config = build_config()
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # what writes to the residual stream starts smaller, by the number of writers
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model
