"""What a fused model knows of its members: in `config.fxfusion` for readers, on the model for `unfuse`.

    config.fxfusion["fused"] = {"groups": [[4, 5, 6]], "norm": "fold", "layers": 12, "kept": [0, 1, 2, 3, 4, 7, ...]}

A window, whose inner layers kept their attention, is {"members": [4, 5], "mixers": "hoist"} there; "wide": one layer.
Layers are numbered as in the model that was loaded; `kept` are those that are left, in order. `shards` is there where
the channels are ordered for tensor parallelism, `removed` (a list) where layers went whole.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.cache_slots import SHARING_NAMES
from fxfusion.models.drop_record import fused_entry, read_record, read_refit
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.ffn_surgery.residue import Residue
from fxfusion.models.ffn_surgery.snapshot import Changes
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import NormMode

_ENTRY, _FUSED = "fxfusion", "fused"
_STATE = "_fxfusion_fused"
_ABSENT = object()


@dataclass(slots=True, kw_only=True)
class FusedState:
    """`shells`: the layers that went, by number, their parameters on the meta device; `parts`: modules that went from
    layers that stayed, by path in the unfused model, their parameters there too. `changes`: of configs and
    modules. `residue`: what the wide weights do not tell."""

    recipe: FuseRecipe
    plan: FusionPlan
    shells: dict[int, nn.Module]
    parts: dict[str, nn.Module]
    residue: Residue
    changes: Changes


def fused_state(model: nn.Module) -> FusedState | None:
    """What `fuse` left on the model; None where it is not fused in this process."""
    found = vars(model).get(_STATE)
    return found if isinstance(found, FusedState) else None


def set_fused_state(model: nn.Module, state: FusedState | None) -> None:
    if state is None:
        vars(model).pop(_STATE, None)
    else:
        object.__setattr__(model, _STATE, state)


def write_entry(config: Any, recipe: FuseRecipe, norm: NormMode) -> None:
    """Note the groups in the config, beside the attention that was dropped."""
    found = getattr(config, _ENTRY, None)
    entry: dict[str, Any] = {
        "groups": [group.planned.to_data() for group in recipe.groups],
        "norm": norm,
        "layers": recipe.count,
        "kept": list(recipe.kept),
    }
    if recipe.shards > 1:
        entry["shards"] = recipe.shards
    if recipe.gone:
        entry["removed"] = list(recipe.gone)
    setattr(config, _ENTRY, {**(found if isinstance(found, dict) else {}), _FUSED: entry})


def forget_entry(config: Any) -> None:
    """Take the note of fused groups out of the config."""
    rest = {key: value for key, value in getattr(config, _ENTRY).items() if key != _FUSED}
    if rest:
        setattr(config, _ENTRY, rest)
    else:
        delattr(config, _ENTRY)


def plan_of(model: nn.Module) -> FusionPlan:
    """The attention that was dropped from a model, the layers that went whole, and the groups that were fused, as a
    plan for the model as it was loaded. Empty where nothing was. It names no file of a folder."""
    state = fused_state(model)
    config = getattr(model, "config", None)
    record, entry = read_record(config), fused_entry(config)
    dropped, refit = () if record is None else tuple(record.dropped_attention), read_refit(config)
    if state is not None:
        return state.plan.replace(dropped_attention=dropped, refit=refit, residue=None)
    if entry is None:
        return FusionPlan(dropped_attention=dropped, refit=refit)
    try:
        removed = entry.get("removed", ())
        return FusionPlan(
            dropped_attention=dropped, groups=entry["groups"], norm=entry["norm"], removed=removed, refit=refit
        )
    except KeyError as error:
        raise SurgeryError(f"config.fxfusion records fused groups without {error}; was it edited?") from None


def intact_config(model: nn.Module) -> Any:
    """A copy of `model.config` in which the number of layers, their types and the cache are those of the intact model.

    Raises `SurgeryError` where the model was fused in another process, so that this is not known.
    """
    model = bare_model(model)
    current: Any = model.config
    state, record = fused_state(model), read_record(current)
    if state is None and fused_entry(current) is not None:
        raise SurgeryError("the model was fused in another process and does not know its config from before")
    memo: dict[int, Any] = {}
    config = copy.deepcopy(current, memo)
    if state is not None:
        state.changes.undo_in(memo)
    if record is not None:
        decoder = config.get_text_config(decoder=True)
        if record.layer_types is not None:
            decoder.layer_types = list(record.layer_types)
        for name in SHARING_NAMES:
            _reset(decoder, name)
        if not any(slot is not None for slot in record.cache_slots):
            config.use_cache = decoder.use_cache = True
    if _ENTRY in vars(config):
        delattr(config, _ENTRY)
    return config


def _reset(config: Any, name: str) -> None:
    """What the config's class says, where it says something."""
    if name in vars(config):
        default = getattr(type(config), name, _ABSENT)
        if default is _ABSENT:
            delattr(config, name)
        else:
            setattr(config, name, copy.deepcopy(default))
