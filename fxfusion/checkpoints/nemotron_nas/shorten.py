"""A decoder with some of its layers, to look at one of each kind. The given one stays as it is; no tensor is copied."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxfusion.models.fingerprint import decoder_layers

_PLAIN = (bool, int, float, str, type(None))
_NUMBERS = (
    "layer_idx",
    "layer_id",
    "layer",
    "intermediate_size",
    "in_features",
    "out_features",
)  # differ and say nothing


def one_of_each_kind(model: nn.Module) -> list[int]:
    """The first layer of each kind: of the same modules, with the same settings, of whatever width."""
    _, layers = decoder_layers(model)
    first: dict[Any, int] = {}
    for number, layer in enumerate(layers):
        kind = tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())
        first.setdefault(kind, number)
    return list(first.values())


def with_layers(model: nn.Module, kept: list[int]) -> nn.Module:
    """A model with these decoder layers, around the modules and the parameters of the given one."""
    path, layers = decoder_layers(model)
    short: Any = _shallow(model)
    holder = short
    for step in path.split(".")[:-1]:
        inner = _shallow(getattr(holder, step))
        holder._modules[step] = inner
        holder = inner
    holder._modules[path.rpartition(".")[2]] = nn.ModuleList(layers[number] for number in kept)
    config = copy.deepcopy(short.config)
    decoder = config.get_text_config(decoder=True)
    for name, value in vars(decoder).items():
        if isinstance(value, list) and len(value) == len(layers):
            setattr(decoder, name, [value[number] for number in kept])
    decoder.num_hidden_layers = len(kept)
    for owner in (short, holder):
        owner.config = config if owner is short else decoder
    shortened: nn.Module = short
    return shortened


def _shallow(module: Any) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple(sorted((name, value) for name, value in found.items() if name not in _NUMBERS))
