"""Small decoders with known modules, and their parallel form in plain eager PyTorch, module by module.

Nothing here uses fxfusion: a layer of the reference calls the attention, norms and FFNs that the model has, whatever
is wrapped around them, so adapters and quantised weights count as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(layers: int = 4, seed: int = 0, **sizes: Any) -> Any:
    """A random Llama in eval mode, its norms' gains too."""
    return randomised(LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}, num_hidden_layers=layers)), seed)


def phi3(layers: int = 4, seed: int = 0) -> Any:
    """The same with gate and up in one matrix."""
    return randomised(Phi3ForCausalLM(Phi3Config(**SIZES, num_hidden_layers=layers)), seed)


def randomised(model: nn.Module, seed: int = 0, only: str = "") -> Any:
    """Random parameters whose names hold `only`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                noise = torch.randn(parameter.shape, generator=generator)
                scaled = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0 + 0.3 * noise
                parameter.copy_(scaled)
    return model.eval()


def with_widths(model: Any, widths: Sequence[int], seed: int = 3) -> Any:
    """Each layer's FFN as wide as its number says, random; 0 takes it away, with its norm."""
    for layer, width in zip(model.model.layers, widths, strict=True):
        if width == 0:
            layer.mlp, layer.post_attention_layernorm = NoFfn(), nn.Identity()
            continue
        layer.mlp.intermediate_size = width
        for name in ("gate_proj", "up_proj"):
            layer.mlp.set_submodule(name, nn.Linear(layer.mlp.hidden_size, width, bias=False))
        layer.mlp.down_proj = nn.Linear(width, layer.mlp.hidden_size, bias=False)
    return randomised(model, seed, only="mlp")


class NoFfn(nn.Module):
    """What stands in for an FFN that was pruned away."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class NoAttention(nn.Module):
    """What stands in for an attention that was pruned away."""

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def without_attention(model: Any, layers: Sequence[int]) -> Any:
    """Some layers' attention taken away by hand, with its norm."""
    for number in layers:
        layer = model.model.layers[number]
        layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
    return model


def token_ids(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, 9), generator=torch.Generator().manual_seed(seed))


class ParallelLayer(nn.Module):
    """A decoder layer whose FFNs, of several layers, all read one stream. `gains`: whose norm each of them reads."""

    def __init__(self, attention: nn.Module | None, ffns: Sequence[nn.Module], gains: Sequence[nn.Module]) -> None:
        super().__init__()
        self.attention, self.ffns, self.gains = attention, ffns, gains  # attention: a whole layer, plain lists

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        x = hidden_states
        if self.attention is not None:
            layer: Any = self.attention
            x = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **given)[0]
        return x + sum(ffn(gain(x)) for ffn, gain in zip(self.ffns, self.gains, strict=True))


@torch.no_grad()
def parallel_logits(
    model: Any,
    dropped: Sequence[int],
    groups: Sequence[Sequence[int]],
    ids: Tensor,
    norm: Literal["fold", "last"] = "fold",
) -> Tensor:
    """Logits of the parallel form of an intact model, which may be PEFT's; the model is left as it is."""
    outer = copy.deepcopy(model)
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    layers = list(inner.model.layers)
    group_of = {layer: list(group) for group in groups for layer in group}
    parallel = []
    for number, layer in enumerate(layers):
        group = group_of.get(number, [number])
        if number == group[0]:
            members = [layers[member] for member in group if hasattr(layers[member].mlp, "down_proj")]
            gains = [(layers[group[-1]] if norm == "last" else m).post_attention_layernorm for m in members]
            keeps = number not in dropped and any(True for _ in layer.self_attn.parameters())
            attention = layer if keeps else None
            parallel.append(ParallelLayer(attention, [member.mlp for member in members], gains))
    inner.model.layers = nn.ModuleList(parallel)
    inner.config.num_hidden_layers = len(parallel)
    logits: Tensor = outer(input_ids=ids, use_cache=False).logits
    return logits


def relative(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, as a part of the reference's."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
