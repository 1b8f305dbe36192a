"""A tiny random language model, and what it computes under a plan, in plain eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.models.traced import TracedModel
from tests.blocks import HIDDEN, Attention, Block, Gated, Rms, randomise

VOCABULARY = 13


class CausalAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Decoder(nn.Module):
    """One decoder layer: attention, then an FFN, each added to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = CausalAttention(HIDDEN)
        self.mlp = Block(Rms(HIDDEN), Gated(HIDDEN, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


class TinyLm(nn.Module):
    """`forward(input_ids [batch, seq])` is the logits `[batch, seq, 13]`; layers of different widths, float64."""

    def __init__(self, layers: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Decoder(8 + 4 * (index % 3)) for index in range(layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        randomise(self, seed)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.planned(input_ids)

    def planned(
        self,
        input_ids: Tensor,
        dropped: Sequence[int] = (),
        groups: Sequence[Sequence[int]] = (),
        norm: Literal["fold", "last"] = "fold",
    ) -> Tensor:
        """The logits under a plan: attentions left out, the FFNs of a group all reading the group's input."""
        group_of = {layer: group for group in groups for layer in group}
        x = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            if index not in dropped:
                x = layer.attention(x)
            group = group_of.get(index, [index])
            if index == group[0]:
                entry = x
            last = self.layers[group[-1]].mlp.norm
            gain = layer.mlp.norm if norm == "fold" else last
            x = x + layer.mlp.ffn(gain(entry))
        logits: Tensor = self.head(x)
        return logits


def ids(batch: int = 2, seq: int = 7, seed: int = 1) -> Tensor:
    """Random token ids `[batch, seq]`."""
    return torch.randint(0, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))


@lru_cache
def traced(layers: int) -> TracedModel:
    """The model with its graphs: each shape is captured once in a process. Not to be changed."""
    return TracedModel(TinyLm(layers))
