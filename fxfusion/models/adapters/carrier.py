"""The adapters of one model while its modules are changed.

adapters = Adapters.taken_off(model, "carry", undo)      plain modules from here on
adapters.read(recipe)                                    what the wide layers get, or a refusal
...                                                      the modules are changed
adapters.put_on()                                        the model has adapters again
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.adapters.carry import Carried, carry
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
        _follow(self.model, getattr(self.outer, "_orig_mod", self.outer), self.renamed)
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


def _follow(model: nn.Module, outer: nn.Module, renamed: Callable[[str], str | None]) -> None:
    """Let PEFT's configs say what the adapters are, so that they are saved and loaded like any others.

    `model`: with its wrappers on; `outer`: what was wrapped around it. `renamed`: what became of a module path.

    Before:  target_modules={gate_proj}, r=8, layers_to_transform=[4, 5, 6]
    After:   target_modules={model.layers.4.mlp.gate_proj}, rank_pattern={model.layers.4.mlp.gate_proj: 24}

    A config that still says it, as most do whose targets are names of modules without numbers, keeps its targets.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    wrappers = find_wrappers(model)
    for adapter, config in configs.items():
        own = {wrapper.path: wrapper.module for wrapper in wrappers if wrapper.tunes and _has(wrapper, adapter)}
        if own:
            _set_targets(config, set(own), model, wrappers)
            _set_pattern(config, "r", "rank_pattern", {path: layer.r[adapter] for path, layer in own.items()})
            alphas = {path: layer.lora_alpha[adapter] for path, layer in own.items()}
            _set_pattern(config, "lora_alpha", "alpha_pattern", alphas)
        if getattr(config, "modules_to_save", None):
            names = [renamed(name) or name for name in config.modules_to_save]
            config.modules_to_save = type(config.modules_to_save)(names)
        if isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True  # what was taken out of the base weights at first is out already
    tuner: Any = getattr(outer, "base_model", None)
    if hasattr(tuner, "targeted_module_names"):
        tuner.targeted_module_names = [wrapper.path for wrapper in wrappers if wrapper.tunes]


def _has(wrapper: Wrapper, adapter: str) -> bool:
    return any(adapter in getattr(wrapper.module, name, ()) for name in wrapper.module.adapter_layer_names)


def _set_targets(config: Any, paths: set[str], model: nn.Module, wrappers: list[Wrapper]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    inside = tuple(f"{wrapper.path}." for wrapper in wrappers)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    if {name for name in names if check_target_module_exists(config, name)} != paths:
        config.target_modules = paths
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _set_pattern(config: Any, default: str, pattern: str, wanted: Mapping[str, float]) -> None:
    from peft.utils.other import get_pattern_key

    known = getattr(config, pattern)
    usual = getattr(config, default)
    if any(known.get(get_pattern_key(known, path), usual) != value for path, value in wanted.items()):
        setattr(config, pattern, {re.escape(path): value for path, value in wanted.items() if value != usual})
