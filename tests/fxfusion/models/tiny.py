"""Tiny causal language models, captured: families of transformers, and hand-written ones of other structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.models.traced import TracedGraph, TracedModel
from tests.blocks import HIDDEN, Gated, Rms, randomise
from tests.end_to_end import families
from tests.end_to_end.families import Family
from tests.end_to_end.family_table import family_named

VOCABULARY = 23

# Pre-norm, Conv1D, two kinds of parallel block, sandwich norms; then norms on outputs, experts.
FAMILIES = [
    *("llama", "gpt2", "gpt_neox", "cohere", "gemma2"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "mixtral", "falcon", "opt")),
]


@lru_cache
def family_model(name: str) -> tuple[Family, nn.Module]:
    """A random model of four layers with all its attention, in eval mode."""
    family = family_named(name)
    torch.manual_seed(0)
    model = families.build(family).to(family.dtype).eval()
    families.randomise(model, 0)
    return family, model


@lru_cache
def traced_family(name: str) -> TracedModel:
    """The same, captured once for each shape of inputs."""
    return TracedModel(family_model(name)[1])


def traced(name: str) -> tuple[Family, nn.Module, Tensor, TracedGraph]:
    """The same with token ids `[2, 6]` and its graph for them."""
    family, model = family_model(name)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    return family, model, ids, traced_family(name).graph(ids)


class Mixing(nn.Module):
    """o(attention(norm(x))), causal, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Rms(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, False)
        self.out = nn.Linear(HIDDEN, HIDDEN, False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])


class Layer(nn.Module):
    """A decoder layer whose `forward` is given: `add(self, x)` with `self.mix`, `self.norm` and `self.ffn`."""

    def __init__(self, add: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.norm, self.ffn = Mixing(), Rms(HIDDEN), Gated()
        self.gate = nn.Linear(HIDDEN, HIDDEN, False)
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)


class Causal(nn.Module):
    """Embedding, layers under `layers.<i>`, final norm, head. Returns logits `[batch, seq, 23]`."""

    def __init__(self, layers: Sequence[Callable[[Layer, Tensor], Tensor]], scale: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(add) for add in layers)
        self.norm, self.head, self.scale = Rms(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, False), scale

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def causal(*layers: Callable[[Layer, Tensor], Tensor], seed: int = 0, scale: float = 1.0) -> Causal:
    """A random float64 model in eval mode."""
    model = Causal(layers, scale)
    randomise(model, seed)
    return model


def token_ids(batch: int = 2, seq: int = 6, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))


# --- forms of a layer ---------------------------------------------------------------------------------


def plain(layer: Layer, x: Tensor) -> Tensor:
    x = x + layer.mix(x)
    return x + layer.ffn(layer.norm(x))


def attention_only(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.mix(x)


def ffn_only(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.ffn(layer.norm(x))


def output_tanh_only(layer: Layer, x: Tensor) -> Tensor:
    """An FFN that cannot fuse, and nothing else."""
    return x + torch.tanh(layer.ffn(layer.norm(x)))


def parallel(layer: Layer, x: Tensor) -> Tensor:
    return layer.mix(x) + layer.ffn(layer.norm(x)) + x


def attention_then_ffn(layer: Layer, x: Tensor) -> Tensor:
    """A parallel block, one addition after the other."""
    return x + layer.mix(x) + layer.ffn(layer.norm(x))


def ffn_then_attention(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.ffn(layer.norm(x)) + layer.mix(x)


def scaled_parallel(layer: Layer, x: Tensor) -> Tensor:
    return x + 0.5 * (layer.mix(x) + layer.ffn(layer.norm(x)))


def flat_ffn(layer: Layer, x: Tensor) -> Tensor:
    """The FFN sees the stream as `[tokens, hidden]`, and so does the addition after it."""
    x = x + layer.mix(x)
    flat = x.reshape(-1, HIDDEN)
    return (flat + layer.ffn(layer.norm(flat))).view(x.shape)


def in_place(layer: Layer, x: Tensor) -> Tensor:
    """Writes the stream itself, which other parts of the layer read."""
    x += layer.mix(x)
    x += layer.ffn(layer.norm(x))
    return x


def inner_addition(layer: Layer, x: Tensor) -> Tensor:
    """The mixer adds values of stream shape inside: one knows of other tokens, one does not."""
    mixed = layer.mix(x)
    x = x + layer.gate(torch.tanh(mixed + layer.scale * x))
    return x + layer.ffn(layer.norm(x))


def two_mixers(layer: Layer, x: Tensor) -> Tensor:
    x = x + layer.mix(x)
    x = x + layer.mix(x * 0.5)
    return x + layer.ffn(layer.norm(x))


def scaled_output(layer: Layer, x: Tensor) -> Tensor:
    return plain(layer, x) * layer.scale


def counting(layer: Layer, x: Tensor) -> Tensor:
    """Updates a buffer of its own, and uses it."""
    layer.calls.add_(1.0)
    return plain(layer, x) * layer.calls


def with_autocast(layer: Layer, x: Tensor) -> Tensor:
    """Switches a mode in the middle of the model."""
    x = x + layer.mix(x)
    with torch.autocast("cpu", enabled=False):
        return x + layer.ffn(layer.norm(x))


def breaking(layer: Layer, x: Tensor) -> Tensor:
    if x.sum().item() > 1e9:
        return x
    return plain(layer, x)


def zero(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A forward hook: nothing in the place of what the module returns first."""
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return type(output)((torch.zeros_like(output[0]), *output[1:]))
