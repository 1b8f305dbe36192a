"""A decoder in the nemotron-nas layout: the configuration that says it, and where each tensor comes from.

Layers that lost both attention and FFN are left out and the others numbered anew, so no folder has padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import WIDTH_MULTIPLE, DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.facts import check_facts, check_ffn, common_eps
from fxfusion.checkpoints.nemotron_nas.parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    DecoderParts,
    LayerParts,
    Source,
    find_parts,
)
from fxfusion.checkpoints.shards import TensorFacts
from fxfusion.errors import CheckpointError

# What is the base model's own and says nothing about the layers. Token ids may be None, and then stay None.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CARRIED = ("attention_dropout", "initializer_range", "max_position_embeddings", "pretraining_tp", "use_cache")
AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the folder: a part of one of the model's, with zeros up to its shape; no source means zeros."""

    facts: TensorFacts
    source: Source | None

    def take(self, state: Mapping[str, Tensor]) -> Tensor:
        """Its values, a copy only where zeros are added."""
        if self.source is None:
            return torch.zeros(self.facts.shape, dtype=self.facts.dtype)
        part = self.source.of(state).detach()
        if tuple(part.shape) == self.facts.shape:
            return part
        padded = part.new_zeros(self.facts.shape)
        padded[tuple(slice(size) for size in part.shape)] = part
        return padded


@dataclass(frozen=True, slots=True)
class Layout:
    """`pieces`: in the order of the layers. `state`: the model's own tensors, by its own names."""

    config: DeciLMConfig
    pieces: list[Piece]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Look through a causal language model, on any device, the meta device included.

        Raises `CheckpointError` that names what the layout cannot say.
        """
        config = _text_config(model)
        heads, head_dim = _heads(config)
        parts = find_parts(model, heads * head_dim)
        parts.layers = [layer for layer in parts.layers if layer.has_attention or layer.has_ffn]
        _check_dtype(parts)
        eps = common_eps(model, parts)
        for layer in parts.layers:
            if layer.has_ffn:
                check_ffn(model, layer)
        check_facts(model, config, parts)
        sizes = _Sizes.of(parts, heads, head_dim)
        return cls(_config(config, parts, sizes, eps), list(_Pieces(parts, sizes).all()), parts.state)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Shared by all layers. `dtype`: of every tensor; the biases say whether any layer has one."""

    hidden: int
    vocabulary: int
    heads: int
    head_dim: int
    kv_heads: int
    dtype: torch.dtype
    attention_bias: bool
    ffn_bias: bool

    @classmethod
    def of(cls, parts: DecoderParts, heads: int, head_dim: int) -> _Sizes:
        """Raises `CheckpointError` where layers differ in their heads, and where the first has no attention."""
        embedding = parts.state[parts.embedding]
        vocabulary, hidden = embedding.shape
        if head_dim * heads != hidden:
            raise CheckpointError(
                f"the nemotron-nas layout has head_dim = hidden / heads; here it is {head_dim}, not {hidden} / {heads}"
            )
        attention = [layer for layer in parts.layers if layer.has_attention]
        if not parts.layers or not parts.layers[0].has_attention:
            first = parts.layers[0].path if parts.layers else "the decoder"
            raise CheckpointError(
                f"the nemotron-nas layout needs attention in its first layer, for vLLM; {first} has none"
            )
        found: dict[int, str] = {}
        for layer in attention:
            rows = {role: _rows(layer, role) for role in ("q_proj", "k_proj", "v_proj")}
            if rows["q_proj"] != hidden or rows["k_proj"] != rows["v_proj"] or rows["k_proj"] % head_dim:
                raise CheckpointError(f"{layer.modules['attention']} does not have {heads} heads of {head_dim}: {rows}")
            found.setdefault(rows["k_proj"] // head_dim, layer.modules["attention"])
        if len(found) > 1:
            (one, first), (other, second), *_ = found.items()
            raise CheckpointError(
                "the nemotron-nas layout has one number of key-value heads, for vLLM; "
                f"{first} has {one}, {second} has {other}"
            )
        names = {name for layer in parts.layers for name in layer.tensors if name.endswith(".bias")}
        has_bias = [any(f"{role}.bias" in names for role in roles) for roles in (ATTENTION, FFN)]
        return cls(hidden, vocabulary, heads, head_dim, next(iter(found)), embedding.dtype, *has_bias)

    def width(self, layer: LayerParts) -> int:
        """Intermediate channels in the folder; 0 without an FFN."""
        return -(-_rows(layer, "up_proj") // WIDTH_MULTIPLE) * WIDTH_MULTIPLE if layer.has_ffn else 0


@dataclass(frozen=True, slots=True)
class _Pieces:
    parts: DecoderParts
    sizes: _Sizes

    def all(self) -> list[Piece]:
        parts, sizes = self.parts, self.sizes
        table = (sizes.vocabulary, sizes.hidden)
        found = [self._outside("model.embed_tokens.weight", parts.embedding, table)]
        for number, layer in enumerate(parts.layers):
            found += self._of_layer(f"model.layers.{number}", layer)
        found.append(self._outside("model.norm.weight", parts.norm, (sizes.hidden,)))
        if parts.head is not None:
            found.append(self._outside("lm_head.weight", parts.head, table))
        return found

    def _of_layer(self, prefix: str, layer: LayerParts) -> list[Piece]:
        sizes = self.sizes
        found: list[Piece] = []
        hidden, kv = sizes.hidden, sizes.kv_heads * sizes.head_dim
        if layer.has_attention:
            found.append(self._piece(f"{prefix}.", layer, f"{ATTENTION_NORM}.weight", (hidden,)))
            for role, rows in zip(ATTENTION, (hidden, kv, kv, hidden), strict=True):
                found += self._linear(f"{prefix}.self_attn.", layer, role, (rows, hidden), sizes.attention_bias)
        if layer.has_ffn:
            found.append(self._piece(f"{prefix}.", layer, f"{FFN_NORM}.weight", (hidden,)))
            width = _rows(layer, "up_proj")
            for role, shape in zip(FFN, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
                found += self._linear(f"{prefix}.mlp.", layer, role, shape, sizes.ffn_bias)
        return found

    def _linear(self, prefix: str, layer: LayerParts, role: str, own: tuple[int, int], has_bias: bool) -> list[Piece]:
        """`own`: the shape in the model. In the folder an FFN may be wider."""
        shape = own
        if role in FFN:
            width = self.sizes.width(layer)
            shape = (own[0], width) if role == "down_proj" else (width, own[1])
        found = [self._piece(prefix, layer, f"{role}.weight", own, shape)]
        return [*found, self._piece(prefix, layer, f"{role}.bias", own[:1], shape[:1])] if has_bias else found

    def _piece(
        self, prefix: str, layer: LayerParts, name: str, own: tuple[int, ...], shape: tuple[int, ...] | None = None
    ) -> Piece:
        facts = TensorFacts(prefix + name, shape or own, self.sizes.dtype)
        source = layer.tensors.get(name)
        if source is None:  # a bias that other layers or projections have
            return Piece(facts, None)
        found = (source.end - source.begin, *self.parts.state[source.name].shape[1:])
        if found != own:
            raise CheckpointError(f"{source.name} is {list(found)}, where its layer has {list(own)}")
        return Piece(facts, source)

    def _outside(self, name: str, source: str, shape: tuple[int, ...]) -> Piece:
        found = tuple(self.parts.state[source].shape)
        if found != shape:
            raise CheckpointError(f"{source} is {list(found)}, where the layout has {list(shape)}")
        return Piece(TensorFacts(name, shape, self.sizes.dtype), Source(source, 0, shape[0]))


def _config(config: Any, parts: DecoderParts, sizes: _Sizes, eps: float) -> DeciLMConfig:
    widths = [sizes.width(layer) for layer in parts.layers]
    base_width = getattr(config, "intermediate_size", None)
    blocks = [_block(layer, sizes) for layer in parts.layers]
    carried: dict[str, Any] = {name: getattr(config, name, None) for name in _CARRIED}
    carried = {name: value for name, value in carried.items() if value is not None}
    carried |= {name: getattr(config, name, None) for name in _TOKEN_IDS} | {"auto_map": dict(AUTO_MAP)}
    return DeciLMConfig(
        **carried,
        architectures=["DeciLMForCausalLM"],
        attention_bias=sizes.attention_bias,
        block_configs=blocks,
        dtype=str(sizes.dtype).removeprefix("torch."),
        hidden_act="silu",
        hidden_size=sizes.hidden,
        intermediate_size=base_width if type(base_width) is int else max(widths),
        mlp_bias=sizes.ffn_bias,
        num_attention_heads=sizes.heads,
        num_hidden_layers=len(blocks),
        num_key_value_heads=sizes.kv_heads,
        rms_norm_eps=eps,
        rope_parameters=dict(config.rope_parameters),
        tie_word_embeddings=parts.head is None,
        vocab_size=sizes.vocabulary,
    )


def _block(layer: LayerParts, sizes: _Sizes) -> dict[str, Any]:
    group = sizes.heads // sizes.kv_heads if layer.has_attention else None
    mult = 1.5 * sizes.width(layer) / sizes.hidden if layer.has_ffn else None
    return {
        "attention": {"n_heads_in_group": group, "no_op": group is None},
        "ffn": {"ffn_mult": mult, "no_op": mult is None},
    }


def _text_config(model: nn.Module) -> Any:
    from transformers import PreTrainedConfig

    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise CheckpointError(f"{type(model).__name__} is no transformers model: it has no config")
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"the nemotron-nas layout holds decoders only; {type(model).__name__} is an encoder-decoder model"
        )
    return config.get_text_config(decoder=True)


def _heads(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None)
    if type(heads) is not int or type(getattr(config, "hidden_size", None)) is not int:
        raise CheckpointError(
            "the nemotron-nas layout has num_attention_heads and hidden_size, and the model's config does not"
        )
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _rows(layer: LayerParts, role: str) -> int:
    source = layer.tensors[f"{role}.weight"]
    return source.end - source.begin


def _check_dtype(parts: DecoderParts) -> None:
    first = parts.state[parts.embedding].dtype
    for name, value in parts.state.items():
        if value.dtype != first:
            raise CheckpointError(
                f"the nemotron-nas layout has one dtype: {parts.embedding} is {first}, {name} is {value.dtype} "
                "(model.to(dtype) gives them one)"
            )
