"""What a config says about attention that was dropped: `config.fxfusion`, plain lists, so that it is saved with it.

    {"dropped_attention": [4, 5], "cache_slots": [0, 1, 2, 3, None, None, 4, 5], "layer_types": None,
     "as_loaded": [4], "fused": {...} of ffn_surgery/record.py, "refit": {...}: fields of `fxfusion.plan.record.Refit`}

Layers are numbered as in the intact model. `layer_types` is the intact model's list, which building the modules
anew from the config needs; `config.layer_types` itself follows the cache slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from fxfusion.errors import SurgeryError
from fxfusion.models.cache_slots import set_attribute
from fxfusion.plan.record import Refit

NAME = "fxfusion"
_AS_LOADED = "as_loaded"  # layers that had no attention in the folder that the model came from
_KEYS = ("dropped_attention", "cache_slots", "layer_types")


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRecord:
    """`dropped_attention`: layers, in order. `cache_slots`: for each layer, None where it has none. `layer_types`: of
    the intact model, None where its config lists none."""

    dropped_attention: list[int]
    cache_slots: list[int | None]
    layer_types: list[str] | None


def read_record(config: Any) -> DropRecord | None:
    """What was dropped so far, or None.

    Raises `SurgeryError` where the record is none of ours.
    """
    found = getattr(config, NAME, None)
    if not isinstance(found, dict) or "dropped_attention" not in found:
        return None
    missing = [key for key in _KEYS if key not in found]
    if missing:
        raise SurgeryError(f"config.{NAME} records dropped attention without {missing[0]}; was it edited?")
    return DropRecord(**{key: found[key] for key in _KEYS})


def note_as_loaded(config: Any, layers: Iterable[int]) -> None:
    """Note that layers had no attention when the model was loaded: without it, it is intact."""
    found = getattr(config, NAME, None)
    setattr(config, NAME, {**(found if isinstance(found, dict) else {}), _AS_LOADED: sorted(layers)})


def dropped_since(config: Any) -> list[int]:
    """Layers whose attention was dropped since the model was loaded."""
    record = read_record(config)
    if record is None:
        return []
    return [layer for layer in record.dropped_attention if layer not in getattr(config, NAME).get(_AS_LOADED, ())]


def fused_entry(config: Any) -> dict[str, Any] | None:
    """What the config says of fused groups, or None."""
    found = getattr(config, NAME, None)
    entry = found.get("fused") if isinstance(found, dict) else None
    return dict(entry) if isinstance(entry, dict) else None


def read_refit(config: Any) -> Refit | None:
    """That the model was refitted, and on what, or None. Raises `SurgeryError` where the record is none of ours."""
    found = getattr(config, NAME, None)
    entry = found.get("refit") if isinstance(found, dict) else None
    if entry is None:
        return None
    try:
        return Refit.model_validate(entry)
    except ValidationError as error:
        raise SurgeryError(
            f"config.{NAME} has a record of a refit that cannot be read; was it edited? {error}"
        ) from None


def write_refit(config: Any, record: Refit) -> None:
    """Put the record into the config, beside what else is noted there."""
    found = getattr(config, NAME, None)
    entry = record.model_dump(mode="json", exclude_none=True)
    setattr(config, NAME, {**(found if isinstance(found, dict) else {}), "refit": entry})


def write_record(config: Any, record: DropRecord, undo: ExitStack) -> None:
    """Put the record into the config, beside what else is noted there."""
    found = getattr(config, NAME, None)
    set_attribute(config, NAME, {**(found if isinstance(found, dict) else {}), **asdict(record)}, undo)
