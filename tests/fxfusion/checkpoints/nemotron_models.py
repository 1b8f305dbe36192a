"""Tiny decoders for the tests of the nemotron-nas layout, changed by hand: no code of the package touches them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, HEADS, KV_HEADS, WIDTH, VOCABULARY, LAYERS = 64, 4, 2, 256, 101, 6
FUSED = (2, 3, 4)
"""Layers of `fused_decoder` that become one; their attention is gone."""


class NoAttention(nn.Module):
    """Adds nothing to the stream, and has no parameter."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[int, None]:
        return 0, None


def settings(**others: Any) -> dict[str, Any]:
    """Of a tiny decoder."""
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **others,
    }


def decoder(seed: int = 0, **others: Any) -> LlamaForCausalLM:
    """A random decoder with all its attention, in eval mode."""
    return randomised(LlamaForCausalLM(LlamaConfig(**settings(**others))), seed)


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Matrices of gain about one, norms around one, biases well away from zero, so that nothing is left unseen."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if value.dim() > 1:
                value.copy_(noise * (1.0 if "embed" in name else value.shape[-1] ** -0.5))
            else:
                value.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)
    return model.eval()


def without_attention(model: Any, layers: Iterable[int]) -> Any:
    """The model without the attention of some layers, its cache slots counted anew."""
    for number in layers:
        model.model.layers[number].self_attn = NoAttention()
        model.model.layers[number].input_layernorm = nn.Identity()
    return renumbered(model)


def renumbered(model: Any) -> Any:
    """Give surviving attentions the first cache slots, and the config the number of layers."""
    slots = 0
    for layer in model.model.layers:
        if not isinstance(layer.self_attn, NoAttention):
            layer.self_attn.layer_idx = slots
            slots += 1
    count = len(model.model.layers)
    model.config.num_hidden_layers = count
    model.config.kv_sharing_modes = [None] * slots + ["reuse"] * (count - slots)
    return model


@torch.no_grad()
def fused_by_hand(model: Any, members: Sequence[int]) -> Any:
    """One wide FFN in the first member's layer, with the gains of all folded into it; the other layers go."""
    layers = model.model.layers
    ffns = [(layers[number].post_attention_layernorm.weight, layers[number].mlp) for number in members]
    wide = layers[members[0]].mlp
    gate = torch.cat([mlp.gate_proj.weight * gain for gain, mlp in ffns])
    up = torch.cat([mlp.up_proj.weight * gain for gain, mlp in ffns])
    down = torch.cat([mlp.down_proj.weight for _, mlp in ffns], dim=1)
    for linear, weight in ((wide.gate_proj, gate), (wide.up_proj, up), (wide.down_proj, down)):
        linear.weight = nn.Parameter(weight)
        linear.out_features, linear.in_features = weight.shape
    layers[members[0]].post_attention_layernorm.weight.fill_(1.0)
    model.model.layers = nn.ModuleList(layer for number, layer in enumerate(layers) if number not in members[1:])
    return renumbered(model)


def fused_decoder(**others: Any) -> Any:
    """Six layers; 2, 3 and 4 lose their attention and become one FFN: four layers, the third 768 wide."""
    return fused_by_hand(without_attention(decoder(**others), FUSED), FUSED)


def ids(tokens: int = 11, vocabulary: int = VOCABULARY) -> Tensor:
    """Token ids `[2, tokens]`, none of them special."""
    return torch.randint(3, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Without a cache, `[2, tokens, vocabulary]`."""
    found: Tensor = model(ids() if tokens is None else tokens, use_cache=False).logits
    return found


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())
