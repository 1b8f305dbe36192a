"""Take the layers that PEFT wraps around modules off a model, and put them on again.

Before:  gate_proj: lora.Linear(base_layer=Linear, lora_A, lora_B)
After:   gate_proj: Linear                                               the wrapper is kept aside
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.errors import SurgeryError

MERGE_FIRST = "merge the adapters first (`merge_and_unload`), or fuse with adapters='merge'"


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


def merge(wrappers: list[Wrapper], undo: ExitStack) -> None:
    """Add what the active adapters learned to the weights of the inner modules, and take the wrappers off.

    `undo` subtracts it again, which gives the weights back to rounding. Raises `SurgeryError` where an adapter
    cannot be merged.
    """
    for wrapper in wrappers:
        if wrapper.tunes:
            try:
                wrapper.module.merge(safe_merge=True)
            except (ValueError, NotImplementedError) as error:
                raise SurgeryError(f"{wrapper.path}: its adapter cannot be merged: {error}") from error
            undo.callback(wrapper.module.unmerge)
        else:
            wrapper.inner = _active_part(wrapper)
    take_off([wrapper for wrapper in wrappers if wrapper.tunes], undo)
    for wrapper in wrappers:
        if not wrapper.tunes:
            undo.callback(wrapper.holder._modules.__setitem__, wrapper.name, wrapper.module)
            wrapper.take_off()


def _active_part(wrapper: Wrapper) -> nn.Module:
    """Of a module that was trained beside its original: the one that the model uses."""
    trained = getattr(wrapper.module, "modules_to_save", None)
    if not isinstance(trained, nn.ModuleDict):
        raise SurgeryError(f"{wrapper.path}: {type(wrapper.module).__name__} cannot be merged here: {MERGE_FIRST}")
    names = [name for name in wrapper.module.active_adapters if name in trained]
    return trained[names[0]] if names and not wrapper.module.disable_adapters else wrapper.inner
