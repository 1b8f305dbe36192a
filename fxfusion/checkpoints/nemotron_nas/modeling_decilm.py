"""A decoder whose layers differ, out of the stock building blocks of transformers.

    x = x + self_attn(input_layernorm(x))         where the layer's block has attention
    x = x + mlp(post_attention_layernorm(x))      where it has an FFN, of the block's own width

A layer holds only the modules that it uses. Attention is numbered in the key-value cache by how many come before it, so
that the slots in use are the first ones. This file is copied into checkpoint folders: it needs torch and transformers.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

# Relative, as transformers looks for the files of a checkpoint folder.
from .configuration_decilm import DeciLMConfig  # noqa: TID252


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One layer. `slot`: the number of its attention in the key-value cache, None where it has none."""

    def __init__(self, config: DeciLMConfig, layer: int, slot: int | None) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        block = config.block_configs[layer]  # type: ignore[index]  # a list since it was made
        own = copy.copy(config)  # the sizes of this layer, for modules that read them
        self.has_attention, self.has_ffn = slot is not None, not block.ffn.no_op
        if slot is not None:
            own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = LlamaAttention(own, slot)
            self.self_attn.config = config  # which implementation of attention is chosen there
        if self.has_ffn:
            own.intermediate_size = config.ffn_width(layer)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(own)
            self.mlp.config = config

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.has_attention:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self.has_ffn:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    """The decoder without its head; `forward` is the stock one."""

    config: DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": LlamaAttention}

    def __init__(self, config: DeciLMConfig) -> None:
        if reason := config.unsupported():
            raise ValueError(reason)
        super(LlamaModel, self).__init__(config)  # not LlamaModel's own, which makes layers that are all alike
        blocks = config.block_configs or []
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            DeciLMDecoderLayer(config, layer, slot) for layer, slot in enumerate(_cache_slots(blocks))
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        used = sum(not block.attention.no_op for block in blocks)
        # Caches built from the config get no storage for the slots that no attention uses.
        config.kv_sharing_modes = [None] * used + ["reuse"] * (len(blocks) - used)
        self.post_init()  # type: ignore[no-untyped-call]


class DeciLMForCausalLM(LlamaForCausalLM):
    """The decoder with a language-model head; `forward` is the stock one."""

    config: DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config: DeciLMConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # for the same reason
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


def _cache_slots(blocks: list[Any]) -> list[int | None]:
    slots: list[int | None] = []
    for block in blocks:
        used = sum(slot is not None for slot in slots)
        slots.append(None if block.attention.no_op else used)
    return slots


__all__ = ["DeciLMForCausalLM", "DeciLMModel"]
