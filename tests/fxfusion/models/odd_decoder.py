"""A small decoder with a config and a cache whose structure can be odd in the ways that surgery must notice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.blocks import Gated, Rms

HIDDEN, VOCABULARY = 16, 97


class OddConfig(PreTrainedConfig):
    """`form`: see `OddLayer`. `index`: how the attention calls its cache slot, which is off by `offset`."""

    model_type = "odd"

    def __init__(
        self, form: str = "plain", index: str = "layer_idx", offset: int = 0, use_cache: bool = True, **kwargs: Any
    ) -> None:
        self.form, self.index, self.offset, self.use_cache = form, index, offset, use_cache
        self.num_hidden_layers, self.hidden_size, self.vocab_size = 4, HIDDEN, VOCABULARY
        super().__init__(**kwargs)


class OddAttention(nn.Module):
    def __init__(self, config: OddConfig, layer: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, False)
        self.out = nn.Linear(HIDDEN, HIDDEN, False)
        self.index, self.offset, self.named = config.index, config.offset, config.form == "named"
        setattr(self, config.index, layer + config.offset)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Any:
        q, k, v = (value[:, None] for value in self.qkv(x).chunk(3, -1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, getattr(self, self.index) - self.offset)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return {"out": self.out(mixed[:, 0])} if self.named else (self.out(mixed[:, 0]), v)


class OddLayer(nn.Module):
    """`plain`: norm, attention, FFN. `inline`: the layer computes the attention itself. `shared`: the FFN reads a
    value of the attention. `named`: the attention returns a dict. `forgetful`: positions ignore the cache."""

    def __init__(self, config: OddConfig, layer: int) -> None:
        super().__init__()
        self.form = config.form
        self.norm, self.norm2, self.ffn = Rms(HIDDEN), Rms(HIDDEN), Gated(HIDDEN, 24)
        if self.form == "inline":
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, False)
        else:
            self.mix = OddAttention(config, layer)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        if self.form == "inline":
            q, k, v = (value[:, None] for value in self.qkv(self.norm(x)).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
            return x + self.ffn(self.norm2(x))
        mixed = self.mix(self.norm(x), past_key_values)
        x = x + (mixed["out"] if self.form == "named" else mixed[0])
        if self.form == "shared":
            return x + self.ffn(self.norm2(x) + mixed[1][:, 0, -x.shape[1] :])
        return x + self.ffn(self.norm2(x))


class OddDecoder(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_ids"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(32, HIDDEN)
        self.blocks = nn.ModuleList(OddLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm, self.head = Rms(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool | None = None
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        counts = past_key_values is not None and self.config.form != "forgetful"
        seen = past_key_values.get_seq_length() if counts else 0
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device) + seen)
        for block in self.blocks:
            x = block(x, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(self.norm(x)), past_key_values=past_key_values)


def odd_decoder(**settings: Any) -> OddDecoder:
    """A random float32 one, in eval mode."""
    torch.manual_seed(0)
    model = OddDecoder(OddConfig(**settings)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.4 if value.dim() > 1 else 1.0)
    return model
