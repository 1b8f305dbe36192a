"""Take the layers that PEFT wraps around modules off a model, and put them on again.

Before:  gate_proj: lora.Linear(base_layer=Linear, lora_A, lora_B)
After:   gate_proj: Linear                                               the wrapper is kept aside
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.snapshot import plain_attributes

MERGE_FIRST = "fuse with adapters='merge'"


@dataclass(slots=True)
class Wrapper:
    """One wrapping layer. `path`: of what it wraps; `holder`: the module that holds it as child `name`; `inner`: what
    it wraps. `tunes`: it adds to what the inner module computes; others stand in its place."""

    path: str
    holder: nn.Module
    name: str
    module: Any
    inner: nn.Module
    tunes: bool

    def take_off(self) -> None:
        self.holder._modules[self.name] = self.inner

    def put_on(self) -> None:
        """Where the inner module still is; the wrapper of a module that went goes with it."""
        if self.holder._modules.get(self.name) is self.inner:
            self.holder._modules[self.name] = self.module


def find_wrappers(model: nn.Module) -> list[Wrapper]:
    """The outermost wrapping layers, in the model's order; none where PEFT was never imported."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def walk(module: nn.Module, path: str) -> Iterator[Wrapper]:
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            if isinstance(child, BaseTunerLayer):
                yield Wrapper(own, module, name, child, child.get_base_layer(), True)
            elif isinstance(child, AuxiliaryTrainingWrapper):
                yield Wrapper(own, module, name, child, child.original_module, False)
            else:
                yield from walk(child, own)

    return list(walk(model, ""))


def active_adapters(model: nn.Module) -> list[str]:
    """Paths of the layers that an adapter changes: neither merged into them nor switched off."""
    return [
        wrapper.path
        for wrapper in find_wrappers(model)
        if wrapper.tunes and not wrapper.module.merged and not wrapper.module.disable_adapters
    ]


def take_off(wrappers: list[Wrapper], undo: ExitStack) -> None:
    for wrapper in wrappers:
        wrapper.take_off()
        undo.callback(wrapper.put_on)


def merge(model: nn.Module, wrappers: list[Wrapper], undo: ExitStack) -> None:
    """Add what the active adapters learned to the weights of the inner modules; the wrappers are off the model.

    Weights that other modules share become the inner module's own first, so that nothing is added to them twice.
    `undo` puts the very tensors from before back: nothing is subtracted. Until it is let go, what is merged into is in
    memory twice. Raises `SurgeryError` where an adapter cannot be merged.
    """
    shared = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    for wrapper in wrappers:
        if wrapper.module.disable_adapters:
            continue
        _keep(wrapper, undo)
        for module in wrapper.inner.modules():
            _own_values(module, shared)
        try:
            if wrapper.tunes:
                _give_bias(wrapper)
                wrapper.module.merge(safe_merge=True)
            else:
                found = wrapper.module.unload_and_optionally_merge_module(
                    merge=True, safe_merge=True, adapter_names=None
                )
                wrapper.holder._modules[wrapper.name] = found
        except Exception as error:  # whatever this kind of adapter cannot do
            kind = type(wrapper.module).__name__
            raise SurgeryError(f"{wrapper.path}: its adapter ({kind}) cannot be merged: {error}") from error


def unshare(layers: nn.Module, undo: ExitStack) -> None:
    """Give layers that PEFT repeated (`layer_replication`) weights of their own, which fusing needs."""
    known = set[int]()
    for module in layers.modules():
        for name, value in module._parameters.items():
            if value is not None and id(value) in known:
                undo.callback(module._parameters.__setitem__, name, value)
                module._parameters[name] = nn.Parameter(value.data.clone(), requires_grad=value.requires_grad)
            known.add(id(value))


def _keep(wrapper: Wrapper, undo: ExitStack) -> None:
    """Have `undo` put back what merging changes: tensors, and what the wrapper notes of it."""
    undo.callback(wrapper.holder._modules.__setitem__, wrapper.name, wrapper.inner)
    for module in dict.fromkeys((*wrapper.inner.modules(), *wrapper.module.modules())):
        undo.callback(_restore, module, dict(module._parameters), dict(module._buffers), plain_attributes(module))
        for value in module._parameters.values():
            if value is not None:
                undo.callback(setattr, value, "data", value.data)


def _restore(module: nn.Module, parameters: Any, buffers: Any, attributes: dict[str, Any]) -> None:
    module._parameters.clear()
    module._parameters.update(parameters)
    module._buffers.clear()
    module._buffers.update(buffers)
    for name, value in attributes.items():
        setattr(module, name, value)


def _own_values(module: nn.Module, shared: Mapping[int, int]) -> None:
    """Copies for merging to write into; a new parameter where another module has this one, too."""
    for name, value in module._parameters.items():
        if value is None:
            continue
        if shared[id(value)] > 1:
            module._parameters[name] = nn.Parameter(value.data.clone(), requires_grad=value.requires_grad)
        else:
            value.data = value.data.clone()


def _give_bias(wrapper: Wrapper) -> None:
    """An adapter with a bias needs one to be added to."""
    layer, inner = wrapper.module, wrapper.inner
    names = [name for name in layer.active_adapters if getattr(layer, "lora_bias", {}).get(name)]
    if names and isinstance(inner, nn.Linear) and inner.bias is None:
        zeros = inner.weight.data.new_zeros(inner.out_features)
        inner.bias = nn.Parameter(zeros, requires_grad=inner.weight.requires_grad)
