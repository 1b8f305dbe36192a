"""The config of a model as it was loaded, before attention was dropped and FFNs were fused."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.cache_slots import SHARING_NAMES
from fxfusion.models.drop_record import NAME, fused_entry, read_record
from fxfusion.models.ffn_surgery.record import fused_state

_ABSENT = object()


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
    if NAME in vars(config):
        delattr(config, NAME)
    return config


def _reset(config: Any, name: str) -> None:
    """What the config's class says, where it says something."""
    if name in vars(config):
        default = getattr(type(config), name, _ABSENT)
        if default is _ABSENT:
            delattr(config, name)
        else:
            setattr(config, name, copy.deepcopy(default))
