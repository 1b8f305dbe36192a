"""The adapters of one model while its modules are changed.

adapters = Adapters.taken_off(model, "carry", undo)      plain modules from here on
adapters.read(recipe)                                    what the wide layers get, or a refusal
...                                                      the modules are changed
adapters.put_on()                                        the model has adapters again
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.adapters.carry import Carried, carry
from fxfusion.models.adapters.follow import follow
from fxfusion.models.adapters.wrappers import MERGE_FIRST, Wrapper, find_wrappers, merge, take_off, unshare
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.fingerprint import decoder_layers

AdapterMode = Literal["carry", "merge"]


@dataclass(slots=True, kw_only=True)
class Adapters:
    """`outer`: the model as the caller has it; `model`: the one inside. `wrappers`: by path, none once merged.
    `renamed`: what becomes of a module path."""

    outer: nn.Module
    model: nn.Module
    wrappers: Mapping[str, Wrapper]
    mode: AdapterMode = "carry"
    renamed: Callable[[str], str | None] = str
    carried: dict[str, Carried] = field(default_factory=dict)
    merged: bool = False

    @classmethod
    def taken_off(cls, outer: nn.Module, model: nn.Module, mode: AdapterMode, undo: ExitStack) -> Adapters:
        """`undo` puts them on again. Raises `SurgeryError` for another mode, and for what cannot be carried at all."""
        if mode not in ("carry", "merge"):
            raise SurgeryError(f"adapters must be 'carry' or 'merge', not {mode!r}")
        found = find_wrappers(model)
        for name, config in _configs(model).items() if found and mode == "carry" else ():
            if getattr(config, "layer_replication", None):
                raise SurgeryError(f"adapter {name!r} repeats layers (layer_replication): {MERGE_FIRST}")
        take_off(found, undo)
        return cls(outer=outer, model=model, wrappers={wrapper.path: wrapper for wrapper in found}, mode=mode)

    def merge(self, undo: ExitStack) -> None:
        """Where that was asked for: add them to the weights. `undo` gives the weights back, bit for bit."""
        if self.mode == "merge":
            if any(getattr(config, "layer_replication", None) for config in _configs(self.model).values()):
                unshare(decoder_layers(self.model)[1], undo)
            merge(self.model, list(self.wrappers.values()), undo)
            self.merged, self.wrappers = bool(self.wrappers), {}

    def read(self, recipe: FuseRecipe, check: bool) -> None:
        """Find what the wide layers of a recipe get. Raises `SurgeryError` where it cannot be exact."""
        self.renamed = recipe.fused_name
        for group in recipe.parts if self.wrappers else ():
            tensors = {name: _tensor(self.model, name) for name in group.reads}
            self.carried |= carry(group, self.wrappers, tensors, check)

    def put_on(self) -> nn.Module:
        """After the surgery. Returns the model for the caller: what was around it goes when the adapters are merged."""
        if self.merged:
            for name in ("peft_config", "_hf_peft_config_loaded"):
                vars(self.model).pop(name, None)
            return self.model
        if not self.wrappers:
            return self.outer
        used = {id(donor) for carried in self.carried.values() for donor in carried.donors if donor is not None}
        for wrapper in self.wrappers.values():
            if id(wrapper) not in used:
                wrapper.put_on()
        for path, carried in self.carried.items():
            carried.put_on(self.model, self.renamed(path) or path)
        follow(self.model, getattr(self.outer, "_orig_mod", self.outer), self.renamed)
        return self.outer

    def refuse(self, names: Iterable[str], what: str) -> None:
        """Raises `SurgeryError` where the modules of these parameters have adapters."""
        for name in names:
            for path in self.wrappers:
                if name.startswith(f"{path}."):
                    raise SurgeryError(f"{path} has an adapter, {what}: merge it first (`merge_and_unload`)")


def _configs(model: nn.Module) -> Mapping[str, Any]:
    """PEFT's, by the adapter's name."""
    found: Mapping[str, Any] = getattr(model, "peft_config", {})
    return found


def _tensor(model: nn.Module, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)
