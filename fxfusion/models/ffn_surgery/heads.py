"""Tell the modules of an attention that it has more heads.

Before:  self.num_heads = 32, self.num_key_value_heads = 8, q_proj: Linear(4096, 4096); forward reads config.num_heads
After:   self.num_heads = 64, self.num_key_value_heads = 16, q_proj: Linear(4096, 8192); its config says 64, the model's
         own still 32

Most attentions tell the number of their heads from the width of what they project. Others read numbers, of their own
or of the model's config, and which of them cannot be told: several settings are tried, and a proof chooses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.cache_slots import set_attribute
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.widen import resize

_COUNT = re.compile(r"heads?$")  # num_heads, n_head, num_key_value_heads; no head_dim
_WIDTH = re.compile("all_head|embed|hidden|split|inner|size|dim")
_OTHER = re.compile("head_(dim|size)|rot|rope|group|window|max|block|chunk|context|position")


class HeadsConfig:
    """A model's config with other numbers of heads, for the modules of one layer: all else is read from, and written
    to, the config itself."""

    def __init__(self, config: Any, numbers: Mapping[str, int]) -> None:
        vars(self).update(_config=config, _numbers=dict(numbers))

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_numbers") or name.startswith("__"):  # not set yet: a copy in the making
            raise AttributeError(name)
        numbers: dict[str, int] = self._numbers
        own = getattr(type(self._config), "attribute_map", {}).get(name, name)
        return numbers[own] if own in numbers else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


@dataclass(frozen=True, slots=True)
class HeadNumbers:
    """`counts`: how many heads a member's pieces have; `widths`: how many channels; `times`: members."""

    counts: frozenset[int]
    widths: frozenset[int]
    times: int

    @classmethod
    def of(cls, recipe: GroupRecipe) -> HeadNumbers:
        home = recipe.home
        rows = {home.rows(number) for number in range(len(home.projections))}
        widths = {home.width, *rows, *(cut.length for cut in home.cuts)}
        return cls(frozenset(recipe.heads), frozenset(widths), len(recipe.members))

    def own(self, module: nn.Module, with_widths: bool) -> dict[str, int]:
        """Attributes of a module that are such numbers, with their new values."""
        return {
            name: value * self.times
            for name, value in vars(module).items()
            if type(value) is int and (self._is_count(name, value) or (with_widths and self._is_width(name, value)))
        }

    def of_config(self, config: Any) -> dict[str, int]:
        """The same of a config, where only numbers of heads are changed."""
        return {
            name: value * self.times
            for name, value in vars(config).items()
            if type(value) is int and self._is_count(name, value)
        }

    def _is_count(self, name: str, value: int) -> bool:
        return value in self.counts and _COUNT.search(name) is not None

    def _is_width(self, name: str, value: int) -> bool:
        is_named = _WIDTH.search(name) is not None and _OTHER.search(name) is None
        return value in self.widths and is_named


def put_heads(recipe: GroupRecipe, modules: Sequence[nn.Module], model: nn.Module, prove: Callable[[], object]) -> None:
    """Let the modules of an attention know its heads, in the first way with which `prove` passes.

    `recipe`: of the attention, whose parameters are in place; `modules`: its own, inner ones included. Raises
    `SurgeryError` where there is no such way; they are then as they were.
    """
    numbers = HeadNumbers.of(recipe)
    _resize(recipe, model)
    tried: dict[str, None] = {}
    for settings in _settings(numbers, modules):
        with ExitStack() as undo:
            for module, values in settings:
                for name, value in values.items():
                    set_attribute(module, name, value, undo)
            try:
                prove()
            except Exception as error:
                first_line, *_ = f"{error}".split("\n")
                tried[f"{type(error).__name__}: {first_line}"] = None
                continue
            undo.pop_all()
            return
    raise SurgeryError(f"{recipe.home.name} cannot have the heads of {len(recipe.members)}: {'; '.join(tried)}")


def own_configs(modules: Iterable[nn.Module]) -> None:
    """Give modules the model's config back."""
    for module in modules:
        config = vars(module).get("config")
        if isinstance(config, HeadsConfig):
            module.config = config._config


def _settings(numbers: HeadNumbers, modules: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, dict[str, Any]]]]:
    """What to try, in order: all numbers of the modules, numbers of heads alone, none; each without and with a config
    of their own."""
    seen: list[list[tuple[nn.Module, dict[str, Any]]]] = []
    for own in ([numbers.own(module, widths) for module in modules] for widths in (True, False)):
        seen.append(list(zip(modules, own, strict=True)))
    seen.append([(module, {}) for module in modules])
    configs: list[dict[str, Any]] = []
    for module in modules:
        config = vars(module).get("config")
        changed = {} if config is None else numbers.of_config(config)
        configs.append({"config": HeadsConfig(config, changed)} if changed else {})
    for own_settings in seen:
        yield own_settings
        yield [(module, values | config) for (module, values), config in zip(own_settings, configs, strict=True)]


def _resize(recipe: GroupRecipe, model: nn.Module) -> None:
    """What the linear layers know of their sizes."""
    home, times = recipe.home, len(recipe.members)
    for number, matrix in enumerate(home.projections):
        owner = model.get_submodule(matrix.weight.rpartition(".")[0])
        resize(owner, home.rows(number), home.rows(number) * times, "out")
    resize(model.get_submodule(home.down.weight.rpartition(".")[0]), home.width, home.width * times, "in")
