"""Let PEFT's configs say what the adapters of a changed model are, so that they are saved and loaded like any others.

Before:  target_modules={gate_proj}, r=8, layers_to_transform=[4, 5, 6]
After:   target_modules={model.layers.4.mlp.gate_proj}, rank_pattern={model.layers.4.mlp.gate_proj: 24}

A config that still says it, as most do whose targets are names of modules without numbers, keeps its targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fxfusion.models.adapters.wrappers import Wrapper, find_wrappers


def follow(model: nn.Module, outer: nn.Module, renamed: Callable[[str], str | None]) -> None:
    """`model`: with its wrappers on; `outer`: what was wrapped around it. `renamed`: what became of a module path."""
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
