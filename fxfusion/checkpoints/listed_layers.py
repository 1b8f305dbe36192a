"""Models whose layers differ, of the family's own classes: built from the table of layers, without a folder's code.

    config (all layers alike) -> the family's model -> layers with settings of their own, built anew
    -> what layers have not is taken out as `drop_attention` and windows take it out, read off the graph and proved

The model keeps its table (`config.fxfusion_layers`), which says that its config alone does not. Its tensors are named
as in the folder, but those of blocks that stand behind a layer there: here they are layers.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxfusion.cost.layer_forms import KNOWN, LayerForm, layer_forms, unlisted
from fxfusion.errors import CheckpointError, FxFusionError, OptionError
from fxfusion.models.drop_attention import drop_traced
from fxfusion.models.drop_record import note_as_loaded
from fxfusion.models.ffn_surgery.stubs import drop_ffns
from fxfusion.models.fingerprint import decoder_layers

PREFIX = "fused_"
"""Of the model type, in folders that fxfusion wrote for transformers."""

_INDEX = re.compile("layer|idx|index")


def with_table(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """The content of a config.json as if its layers were alike, and their table; None where they are alike.

    Raises `CheckpointError` that names what is not understood.
    """
    try:
        forms = layer_forms(data)
    except OptionError as error:
        raise CheckpointError(str(error)) from None
    if forms is None:
        return dict(data), None
    if not forms:
        raise CheckpointError("it has no layers")
    kind = data.get("model_type")
    plain = unlisted(data, forms)
    if "skip_returns" in data and isinstance(kind, str):
        plain["model_type"] = kind.removeprefix(PREFIX)
    return plain, [form.to_dict() for form in forms]


def table_of(config: Any) -> tuple[LayerForm, ...]:
    """The layers of a config that lists them; empty where they are alike."""
    known = getattr(config, KNOWN, None)
    return () if known is None else layer_forms({KNOWN: known}) or ()


def stored_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """By names of a model's tensors, those that its folder has for them."""
    forms = table_of(getattr(model, "config", None))
    if not forms:
        return {name: name for name in names}
    path, _ = decoder_layers(model)
    found = {}
    for name in names:
        number, dot, rest = name.removeprefix(f"{path}.").partition(".")
        inside = name.startswith(f"{path}.") and number.isdecimal()
        found[name] = f"{path}.{forms[int(number)].place}{dot}{rest}" if inside else name
    return found


def give_layers(model: Any, forms: Sequence[LayerForm]) -> None:
    """Build the layers that have settings or parameters of their own, their parameters on the meta device.

    Raises `CheckpointError` that names the layer which the family cannot build so.
    """
    path, layers = decoder_layers(model)
    if len(layers) != len(forms):
        raise CheckpointError(f"{path} has {len(layers)} layers, and the config lists {len(forms)}")
    config = model.config.get_text_config(decoder=True)
    for number, form in enumerate(forms):
        changed = {name: value for name, value in form.settings.items() if value != getattr(config, name, None)}
        for name in changed:
            if not hasattr(config, name):
                raise CheckpointError(f"layer {number}: {type(config).__name__} has no setting {name}")
        if changed:
            layers[number] = _layer(type(layers[number]), config, changed, number).to(model.dtype).eval()
        for name, shape in form.own.items():
            _give_parameter(layers[number], f"{path}.{number}", name, shape, model.dtype)


def _layer(kind: type[Any], config: Any, changed: Mapping[str, Any], number: int) -> nn.Module:
    own = copy.copy(config)
    index = index_argument(kind)
    try:
        for name, value in changed.items():
            setattr(own, name, value)
        arguments = {index: number} if index else {}
        with torch.device("meta"):  # widths are the file's word
            layer: nn.Module = kind(own, **arguments)
        if any(True for _ in layer.buffers()):  # which no file holds
            layer = kind(own, **arguments)
    except Exception as error:  # whatever the family makes of it
        raise CheckpointError(
            f"layer {number}: {kind.__name__} cannot be built with {dict(changed)}: {error}"
        ) from error
    for module in layer.modules():
        if vars(module).get("config") is own:  # how attention is computed is read from the whole config
            module.config = config
    return layer


def _give_parameter(layer: nn.Module, where: str, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    sizes = list(shape)
    if len(sizes) not in (1, 2) or any(type(size) is not int or size < 1 for size in sizes):
        raise CheckpointError(f"{where}.{name}: no shape of a parameter of its own: {sizes}")
    try:
        owner = layer.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{where} has no {path}, which {name} would belong to") from None
    owner.register_parameter(leaf, nn.Parameter(torch.empty(sizes, dtype=dtype, device="meta")))


def take_out(model: Any, forms: Sequence[LayerForm]) -> None:
    """Take attention and FFNs out of the layers that have none, on the meta device."""
    without = [number for number, form in enumerate(forms) if not form.attention]
    no_ffn = [number for number, form in enumerate(forms) if not form.ffn]
    try:
        if no_ffn:
            drop_ffns(model, no_ffn)
        if without:
            drop_traced(model, without, check=False)
            note_as_loaded(model.config, without)
    except FxFusionError as error:
        raise CheckpointError(f"{type(model).__name__} cannot be built layer by layer: {error}") from error


def index_argument(layer: type[Any]) -> str | None:
    """By which argument a layer is told its number; None without one. Raises `CheckpointError` for others."""
    _, config, *others = inspect.signature(layer.__init__).parameters.values()
    found = next((one.name for one in others if _INDEX.search(one.name)), None)
    needed = [one.name for one in others if one.default is inspect.Parameter.empty and one.name != found]
    if config.name != "config" or needed:
        words = ", ".join([config.name, *needed])
        raise CheckpointError(f"{layer.__name__} is not made of a config and its number alone, but of {words}")
    return found
