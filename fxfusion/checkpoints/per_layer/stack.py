"""A model's decoder layers as transformers can build them: every layer with attention, what has none behind it.

    in memory     0: attention, FFN    1: FFN     2: attention    3: attention, wide FFN
    in the file   0: attention, FFN, further: [FFN]    1: attention    2: attention, wide FFN

`model.layers.1.mlp.up_proj.weight` of the model is `model.layers.0.further.0.mlp.up_proj.weight` there. Engines want an
attention in each layer; the blocks without one are computed in the same order, so nothing changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.errors import CheckpointError, PlanError
from fxfusion.models.ffn_surgery.stubs import NoFfn
from fxfusion.models.fingerprint import decoder_layers
from fxfusion.models.no_attention import NoAttention, NoNorm

FURTHER = "further"
Returns = tuple[str, int | str | None, int | None, int, bool]
_SAME: Returns = ("argument", 0, None, 0, False)


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer of the model in memory. `number`: its place there; `skip`: what is left out of it, by path in
    the layer, with what stands for it (see the template)."""

    number: int
    module: nn.Module
    skip: Mapping[str, Returns]

    @property
    def has_attention(self) -> bool:
        return not any(type(self.module.get_submodule(path)) is NoAttention for path in self.skip)

    @property
    def is_empty(self) -> bool:
        """Whether it lost attention and FFN, so that the stream passes through."""
        kinds = {type(self.module.get_submodule(path)) for path in self.skip}
        return {NoAttention, NoFfn} <= kinds and not any(True for _ in self.module.parameters())


@dataclass(frozen=True, slots=True)
class Classes:
    """The family's own classes."""

    config: type[Any]
    causal: type[Any]
    base: type[Any]
    layer: type[Any]


@dataclass(frozen=True, slots=True)
class Stack:
    """`path`: of the list of layers in the model, `inner` in its base model. `layers`: each with attention, and then
    the blocks behind it."""

    classes: Classes
    path: str
    inner: str
    layers: tuple[tuple[Block, ...], ...]

    @classmethod
    def of(cls, model: Any) -> Stack:
        """Raises `CheckpointError` that names the class or layer for which there is no such form."""
        try:
            path, modules = decoder_layers(model)
        except PlanError as error:
            raise CheckpointError(f"the transformers format holds decoders only: {error}") from None
        base = model.base_model
        holder = model.get_submodule(path)
        inner = next((name for name, module in base.named_modules() if module is holder), None)
        if base is model or inner is None:
            raise CheckpointError(f"{type(model).__name__} has no base model that holds {path}")
        kinds = list(dict.fromkeys(type(module) for module in modules))
        if len(kinds) > 1:
            names = " and ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"the transformers format has one class for all layers; {path} has {names}")
        classes = Classes(type(model.config), type(model), type(base), kinds[0])
        for kind in (classes.config, classes.causal, classes.base, classes.layer):
            _check_importable(kind)
        return cls(classes, path, inner, _grouped(path, [block_of(place, one) for place, one in enumerate(modules)]))

    @property
    def returns(self) -> dict[str, Returns]:
        """By sublayers that are left out, what stands for them. Raises `CheckpointError` where two layers differ."""
        found: dict[str, tuple[int, Returns]] = {}
        for block in self.blocks:
            for path, returned in block.skip.items():
                first, known = found.setdefault(path, (block.number, returned))
                if known != returned:
                    raise CheckpointError(f"layers {first} and {block.number} leave out {path} in different ways")
        return {path: returned for path, (_, returned) in found.items()}

    @property
    def blocks(self) -> list[Block]:
        return [block for layer in self.layers for block in layer]

    def place(self, number: int) -> str | None:
        """Where a layer of the model is in the folder's, such as "4" or "3.further.0"; None where it is left out."""
        for place, (layer, *behind) in enumerate(self.layers):
            if layer.number == number:
                return str(place)
            for further, block in enumerate(behind):
                if block.number == number:
                    return f"{place}.{FURTHER}.{further}"
        return None

    def renamed(self, name: str) -> str:
        """The folder's name of a tensor or module of the model."""
        number, dot, rest = name.removeprefix(f"{self.path}.").partition(".")
        if not name.startswith(f"{self.path}.") or not number.isdecimal():
            return name
        return f"{self.path}.{self.place(int(number))}{dot}{rest}"


def _check_importable(kind: type[Any]) -> None:
    """Raises `CheckpointError` for a class that a file of transformers' own classes cannot name."""
    found = None
    if kind.__module__.startswith("transformers.models."):
        found = getattr(importlib.import_module(kind.__module__), kind.__name__, None)
    if found is not kind:
        raise CheckpointError(
            f"the transformers format names classes of transformers, and {kind.__module__}.{kind.__name__} is none"
        )


def block_of(number: int, layer: nn.Module) -> Block:
    """What a layer is made of, by what stands in it."""
    skip: dict[str, Returns] = {}
    for path, module in layer.named_modules():
        if isinstance(module, NoAttention):
            returned, nothing = module._returned, module._nothing
            like = None if nothing.kind == "number" else returned.alike[nothing.which]
            skip[path] = (nothing.kind, like, returned.items, returned.place, returned.is_list)
        elif isinstance(module, NoNorm):
            skip[path] = _SAME
    return Block(number, layer, skip)


def _grouped(path: str, blocks: list[Block]) -> tuple[tuple[Block, ...], ...]:
    layers: list[list[Block]] = []
    for block in blocks:
        if block.is_empty:
            continue
        if block.has_attention:
            layers.append([block])
        elif layers:
            layers[-1].append(block)
        else:
            raise CheckpointError(
                f"{path}.{block.number} has no attention, and no layer with attention stands before it: engines want "
                "one in each layer, so leave the first layer its attention"
            )
    if not layers:
        raise CheckpointError(f"no layer of {path} has attention")
    return tuple(map(tuple, layers))
