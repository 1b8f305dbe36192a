"""The shapes of the reference model and of a second one, of another family."""

from __future__ import annotations

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

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


def build_second_config() -> GPT2Config:
    """Another family, to check against: 12 layers, hidden 128, 4 heads, FFN 512; learned positions, LayerNorm, GELU,
    biases. 3.0 M parameters, trained in a few minutes."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=1024,
        n_embd=128,
        n_layer=12,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


SHAPES = ("llama", "gpt2")
# What writes to the residual stream.
_WRITERS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")


def build_model(seed: int, shape: str = "llama") -> PreTrainedModel:
    """The reference model, or that of the second family, with random float32 weights, decided by `seed`."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    model = LlamaForCausalLM(build_config()) if shape == "llama" else GPT2LMHeadModel(build_second_config())
    with torch.no_grad():  # what writes to the residual stream starts smaller, by the number of writers
        for name, weight in model.named_parameters():
            if name.endswith(_WRITERS):
                weight.div_(math.sqrt(2 * model.config.num_hidden_layers))
    return model
