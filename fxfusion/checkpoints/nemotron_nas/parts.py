"""Which tensors of a decoder are which of the layout's, found by structure; what has no place in it is refused.

    model.layers.3.mlp.gate_up_proj.weight [2000, 512]   ->  model.layers.3.mlp.gate_proj.weight [1024, 512]
                                                             model.layers.3.mlp.up_proj.weight   [1024, 512]

Rows 0-999 and 1000-1999, with zeros up to the next multiple of 256, which change nothing: silu(0) * 0 = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxfusion.checkpoints.empty_model import check_plain
from fxfusion.errors import CheckpointError, PlanError
from fxfusion.models.fingerprint import decoder_layers

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ATTENTION_LINEARS = (*ATTENTION, "qkv_proj")
_EXPERTS = "experts"
_INNER_NORM = "q/k norm or other norm inside attention"
_NORM_BIAS = "bias in norms, they are RMSNorms"
_LINEAR = f"such linear layer, it has {', '.join((*ATTENTION, *FFN))}"
_THIRD_NORM = f"such norm, it has {ATTENTION_NORM} and {FFN_NORM}"
_OTHER = "such parameter in its layers"
_REASONS = (_EXPERTS, _INNER_NORM, _NORM_BIAS, _LINEAR, _THIRD_NORM, _OTHER)  # the most telling first
_LINEARS = {name: (name,) for name in (*ATTENTION, *FFN)} | _PACKED


@dataclass(frozen=True, slots=True)
class Source:
    """Rows `begin` to `end` of one of the model's tensors (of one with one dimension: entries)."""

    name: str
    begin: int
    end: int

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself where that is all of it, else a view."""
        tensor = tensors[self.name]
        return tensor if self.end - self.begin == tensor.shape[0] else tensor[self.begin : self.end]


@dataclass(slots=True)
class LayerParts:
    """One decoder layer. `tensors`: by the layout's name without the layer, such as `q_proj.weight`; `modules`: paths
    of what holds attention, FFN and norms, by `attention`, `ffn` and the norms' names."""

    path: str
    tensors: dict[str, Source] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)

    @property
    def has_attention(self) -> bool:
        return "attention" in self.modules

    @property
    def has_ffn(self) -> bool:
        return "ffn" in self.modules


@dataclass(slots=True)
class DecoderParts:
    """The whole decoder. `state`: its parameters and persistent buffers by name. `head`: None where it is tied."""

    state: dict[str, Tensor]
    embedding: str
    norm: str
    head: str | None
    layers: list[LayerParts]


def find_parts(model: nn.Module, query_rows: int) -> DecoderParts:
    """Look through a causal language model. `query_rows`: heads times head_dim, to split a packed qkv projection.

    Raises `CheckpointError` that names the first thing that has no place in the layout, or that is missing.
    """
    check_plain(model)
    state = dict(model.state_dict(keep_vars=True))
    try:
        path, modules = decoder_layers(model)
    except PlanError as error:
        raise CheckpointError(f"the nemotron-nas layout holds decoders only: {error}") from None
    layers = [_layer(model, state, f"{path}.{number}", query_rows) for number in range(len(modules))]
    outside = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
    embedding, head = _embeddings(model, outside)
    others = [name for name in outside if name not in (embedding, head) and outside[name] is not outside[embedding]]
    norms = [name for name in others if name.endswith(".weight") and outside[name].dim() == 1]
    for name in others:
        if name not in norms[:1]:
            raise CheckpointError(f"the nemotron-nas layout has no place for {name}")
    if not norms:
        raise CheckpointError(
            "the nemotron-nas layout needs a norm with a gain after the last layer, and the model has none"
        )
    return DecoderParts(state, embedding, norms[0], head, layers)


def _embeddings(model: Any, outside: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """Names of the embedding and of the head, None where it is the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__} has no token embedding and language-model head")
    names = {id(value): name for name, value in reversed(list(outside.items()))}
    found = names[id(embedding.weight)]
    if head.bias is not None:
        raise CheckpointError(f"the nemotron-nas layout has no bias in the head ({names[id(head.bias)]})")
    return found, None if head.weight is embedding.weight else names[id(head.weight)]


def _layer(model: nn.Module, state: Mapping[str, Tensor], path: str, query_rows: int) -> LayerParts:
    parts = LayerParts(path)
    own = {name.removeprefix(f"{path}."): value for name, value in state.items() if name.startswith(f"{path}.")}
    foreign = []
    for name, value in own.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in _LINEARS and parent and type(model.get_submodule(f"{path}.{module}")) is nn.Linear:
            kind = "ffn" if last in FFN or last == "gate_up_proj" else "attention"
            parts.modules[kind] = f"{path}.{parent}"
            for role, begin, end in _split(last, value.shape[0], query_rows):
                parts.tensors[f"{role}.{leaf}"] = Source(f"{path}.{name}", begin, end)
        elif module in (ATTENTION_NORM, FFN_NORM) and leaf == "weight":
            parts.modules[module] = f"{path}.{module}"
            parts.tensors[name] = Source(f"{path}.{name}", 0, value.shape[0])
        else:
            foreign.append(name)
    if foreign:
        reasons = [_no_place(name, own) for name in foreign]
        reason, what = min(zip(reasons, foreign, strict=True), key=lambda found: _REASONS.index(found[0]))
        raise CheckpointError(f"the nemotron-nas layout has no {reason} ({path}.{what} {list(own[what].shape)})")
    _check_complete(parts)
    return parts


def _split(own: str, rows: int, query_rows: int) -> Iterator[tuple[str, int, int]]:
    """Which rows of a projection are which."""
    roles = _LINEARS[own]
    sizes = [rows] if len(roles) == 1 else [rows // 2] * 2
    if own == "qkv_proj":
        sizes = [query_rows, (rows - query_rows) // 2, (rows - query_rows) // 2]
    begin = 0
    for role, size in zip(roles, sizes, strict=True):
        yield role, begin, begin + size
        begin += size


def _no_place(name: str, own: Mapping[str, Tensor]) -> str:
    """Why a tensor of a layer has no place in the layout: one of `_REASONS`. `own`: the layer's tensors."""
    module, _, leaf = name.rpartition(".")
    parent = module.rpartition(".")[0]
    weight = own.get(f"{module}.weight", own[name])
    if any("expert" in other for other in own):
        return _EXPERTS
    if weight.dim() == 1 and leaf == "weight" and any(f"{parent}.{role}.weight" in own for role in _ATTENTION_LINEARS):
        return _INNER_NORM
    if weight.dim() == 1 and leaf == "bias":
        return _NORM_BIAS
    if weight.dim() == 2:
        return _LINEAR
    return _THIRD_NORM if weight.dim() == 1 and leaf == "weight" else _OTHER


def _check_complete(parts: LayerParts) -> None:
    for kind, roles, norm in (("attention", ATTENTION, ATTENTION_NORM), ("ffn", FFN, FFN_NORM)):
        missing = [role for role in roles if f"{role}.weight" not in parts.tensors]
        if kind in parts.modules and missing:
            raise CheckpointError(
                f"the nemotron-nas layout needs {', '.join(roles)}: {parts.modules[kind]} has no {missing[0]}"
            )
        if (kind in parts.modules) != (norm in parts.modules):
            here, there = (kind, norm) if kind in parts.modules else (norm, kind)
            raise CheckpointError(
                f"the nemotron-nas layout has {norm} where there is {kind}: {parts.path} has {here}, but no {there}"
            )
