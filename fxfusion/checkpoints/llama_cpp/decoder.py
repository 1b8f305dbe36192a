"""A decoder as llama.cpp's architecture `deci` has it: numbers of each layer, and where each tensor comes from.

    layer                 head_count   head_count_kv   feed_forward_length
    as it was             H            K               width
    without attention     0            0               width
    without an FFN        H            K               32: an FFN of zeros, since llama.cpp skips the layer at 0
    wide, of m members    m * H        m * K           width of all

Rows of q and k are in llama.cpp's order: it rotates channels 2i and 2i + 1 of a head, where transformers rotates i and
i + size / 2. Models whose layers are all alike are written as `llama`, which has one number for all.
Source: src/models/deci.cpp and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.llama_cpp.rope import Rope
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
from fxfusion.cost.layer_forms import KNOWN
from fxfusion.errors import CheckpointError

BLOCK = 32  # values that are quantised together
_NAMES = {
    **dict(zip(ATTENTION, ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True)),
    **dict(zip(FFN, ("ffn_gate", "ffn_up", "ffn_down"), strict=True)),
    ATTENTION_NORM: "attn_norm",
    FFN_NORM: "ffn_norm",
}
_QKV = ("q_proj", "k_proj", "v_proj")
# Settings that say nothing of what is computed, or that are checked by what modules compute (`facts.py`, `proof.py`).
_CHECKED = (
    *("auto_map", "block_configs", KNOWN, "layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("no_rope_layers", "no_rope_layer_interval", "partial_rotary_factor", "rope_theta", "rope_scaling"),
    *("original_max_position_embeddings", "kv_sharing_modes", "torch_dtype", "fxfusion", "embd_pdrop", "resid_pdrop"),
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the file: rows of one of the model's, in some order; without a source all of one value."""

    name: str
    shape: tuple[int, ...]
    source: Source | None
    order: Tensor | None = None
    fill: float = 0.0

    def rows(self, state: Mapping[str, Tensor], begin: int = 0, end: int | None = None) -> Tensor:
        """Some of its rows (entries of a vector), float32 on the CPU."""
        end = self.shape[0] if end is None else end
        if self.source is None:
            return torch.full((end - begin, *self.shape[1:]), self.fill)
        whole = self.source.of(state).detach()
        part = whole[begin:end] if self.order is None else whole[self.order[begin:end].to(whole.device)]
        return part.to("cpu", torch.float32)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one layer. `zeros`: its FFN is one of zeros, as it has none of its own."""

    heads: int
    kv_heads: int
    width: int
    zeros: bool = False


@dataclass(frozen=True, slots=True)
class GgufDecoder:
    """`pieces`: by name, in the order of the file. `state`: the model's own tensors, by its own names."""

    hidden: int
    vocabulary: int
    head_dim: int
    context: int
    eps: float
    rope: Rope
    layers: list[Numbers]
    pieces: dict[str, Piece]
    state: dict[str, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> GgufDecoder:
        """Look through a causal language model, on any device, the meta device included.

        Raises `CheckpointError` that names what `deci` cannot say: a tensor, a module or a setting.
        """
        with _in_words_of_gguf():
            config = _text_config(model)
            heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
            head_dim = head_dim or config.hidden_size // heads
            parts = find_parts(model, heads * head_dim)
            parts.layers = [layer for layer in parts.layers if layer.has_attention or layer.has_ffn]
            for layer in parts.layers:
                _unpack(layer, parts.state, heads, getattr(config, "num_key_value_heads", None) or heads)
            eps = common_eps(model, parts)
            for layer in parts.layers:
                if layer.has_ffn:
                    check_ffn(model, layer)
            check_facts(model, config, parts)
            _check_config(config)
        vocabulary, hidden = parts.state[parts.embedding].shape
        reader = _Layers(parts, head_dim, hidden)
        rope, numbers = Rope.of(model, config, head_dim), reader.numbers()
        pieces = {one.name: one for one in reader.pieces(numbers, rope, vocabulary)}
        context = int(getattr(config, "max_position_embeddings", None) or 0)
        if not numbers or not context:
            raise CheckpointError("the model has no layers" if context else "config.max_position_embeddings is missing")
        state, dtype = parts.state, parts.state[parts.embedding].dtype
        return cls(hidden, vocabulary, head_dim, context, eps, rope, numbers, pieces, state, dtype)

    @property
    def architecture(self) -> str:
        return "llama" if len(set(self.layers)) == 1 else "deci"

    def settings(self) -> dict[str, Any]:
        """By their names without the architecture; a list is one number for each layer."""
        columns = ([one.heads for one in self.layers], [one.kv_heads for one in self.layers])
        heads, kv_heads, widths = (
            column[0] if self.architecture == "llama" else column
            for column in (*columns, [one.width for one in self.layers])
        )
        return {
            "block_count": len(self.layers),
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": widths,
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self.eps,
            "vocab_size": self.vocabulary,
            **self.rope.settings(),
        }


@dataclass(frozen=True, slots=True)
class _Layers:
    parts: DecoderParts
    head_dim: int
    hidden: int

    def numbers(self) -> list[Numbers]:
        found = [self._numbers(layer) for layer in self.parts.layers]
        if found and not found[0].heads:  # llama.cpp reads the size of heads off the first layer
            found[0] = Numbers(1, 1, found[0].width)
        return found

    def _numbers(self, layer: LayerParts) -> Numbers:
        heads = kv_heads = 0
        if layer.has_attention:
            q, k, v = (_size(layer, role) for role in _QKV)
            heads, kv_heads = q // self.head_dim, k // self.head_dim
            if q % self.head_dim or k % self.head_dim or k != v or not kv_heads or heads % kv_heads:
                raise CheckpointError(
                    f"{layer.modules['attention']} has {q}, {k} and {v} rows of q, k and v: no heads of {self.head_dim}"
                )
        return Numbers(heads, kv_heads, _size(layer, "up_proj") if layer.has_ffn else BLOCK, not layer.has_ffn)

    def pieces(self, numbers: list[Numbers], rope: Rope, vocabulary: int) -> Iterator[Piece]:
        parts, table = self.parts, (vocabulary, self.hidden)
        yield self._own("token_embd.weight", table, Source(parts.embedding, 0, vocabulary))
        if parts.head is not None:
            yield self._own("output.weight", table, Source(parts.head, 0, vocabulary))
        yield self._own("output_norm.weight", (self.hidden,), Source(parts.norm, 0, self.hidden))
        divisors = rope.divisors()
        if divisors is not None:
            self.parts.state["rope_freqs"] = divisors
            yield self._own("rope_freqs.weight", tuple(divisors.shape), Source("rope_freqs", 0, len(divisors)))
        for number, (layer, one) in enumerate(zip(parts.layers, numbers, strict=True)):
            yield from self._of_layer(f"blk.{number}.", layer, one)

    def _of_layer(self, prefix: str, layer: LayerParts, one: Numbers) -> Iterator[Piece]:
        q, kv, width, hidden = one.heads * self.head_dim, one.kv_heads * self.head_dim, one.width, self.hidden
        shapes = {ATTENTION_NORM: (hidden,), "q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        shapes |= {"o_proj": (hidden, q)}
        ffn = {FFN_NORM: (hidden,), "gate_proj": (width, hidden), "up_proj": (width, hidden)}
        ffn |= {"down_proj": (hidden, width)}
        for own, has, wanted in ((shapes, layer.has_attention, q), (ffn, layer.has_ffn, width)):
            for role, shape in own.items() if wanted else ():
                name = f"{prefix}{_NAMES[role]}"
                if not has:  # zeros, whose norm has a gain of ones
                    yield Piece(f"{name}.weight", shape, None, fill=float(len(shape) == 1))
                    continue
                heads = {"q_proj": one.heads, "k_proj": one.kv_heads}.get(role)
                order = None if heads is None else pairs(heads, self.head_dim)
                yield self._own(f"{name}.weight", shape, layer.tensors[f"{role}.weight"], order)
                if f"{role}.bias" in layer.tensors:
                    yield self._own(f"{name}.bias", shape[:1], layer.tensors[f"{role}.bias"], order)

    def _own(self, name: str, shape: tuple[int, ...], source: Source, order: Tensor | None = None) -> Piece:
        found = (source.end - source.begin, *self.parts.state[source.name].shape[1:])
        if found != shape:
            raise CheckpointError(f"{source.name} is {list(found)}, where {name} is {list(shape)}")
        return Piece(name, shape, source, order)


def pairs(heads: int, size: int) -> Tensor:
    """Which row of transformers stands in each row of llama.cpp: channels i and i + size / 2 side by side."""
    return torch.arange(heads * size).reshape(heads, 2, size // 2).transpose(1, 2).flatten()


def _unpack(layer: LayerParts, state: Mapping[str, Tensor], heads: int, kv_heads: int) -> None:
    """Rows of q, k and v in a packed projection, which has more of each where attentions were joined."""
    for leaf in ("weight", "bias"):
        source = layer.tensors.get(f"q_proj.{leaf}")
        if source is None or source.name.split(".")[-2] != "qkv_proj":
            continue
        rows = state[source.name].shape[0]
        q = rows * heads // (heads + 2 * kv_heads)
        kv = (rows - q) // 2
        for role, begin, end in zip(_QKV, (0, q, q + kv), (q, q + kv, rows), strict=True):
            layer.tensors[f"{role}.{leaf}"] = Source(source.name, begin, end)


def _size(layer: LayerParts, role: str) -> int:
    source = layer.tensors[f"{role}.weight"]
    return source.end - source.begin


def _text_config(model: nn.Module) -> Any:
    from transformers import PreTrainedConfig

    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or config.is_encoder_decoder:
        raise CheckpointError(f"{type(model).__name__} is no decoder of transformers, and a GGUF file holds one")
    text = config.get_text_config(decoder=True)
    if (
        type(getattr(text, "num_attention_heads", None)) is not int
        or type(getattr(text, "hidden_size", None)) is not int
    ):
        raise CheckpointError("a GGUF file has numbers of heads and channels, and the model's config does not")
    return text


def _check_config(config: Any) -> None:
    """Raises `CheckpointError` for a setting that nothing here understands and that is not neutral."""
    from transformers import LlamaConfig

    known = {*LlamaConfig().to_dict(), *vars(LlamaConfig()), *_CHECKED}
    for name, value in config.to_dict().items():
        neutral = value in (0, 1) if type(value) in (int, float) else not value
        if not name.startswith("_") and name not in known and not neutral:
            raise CheckpointError(f"GGUF's architecture deci has no such setting: config.{name} = {value!r}")


@contextmanager
def _in_words_of_gguf() -> Iterator[None]:
    """What is found by the nemotron-nas layout's own reader, whose limits these are, said of GGUF."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}".replace("the nemotron-nas layout", "GGUF's architecture deci")) from error
