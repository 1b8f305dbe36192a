"""The layers of a model from a name, a table, a Hugging Face `config.json`, or a folder with one.

A config is read by the fields that it has, in the words of many: `hidden_size`, `n_embd`, `d_model`, ... Where it lists
its layers (`layer_forms.py`), each has its own attention and FFN. What a config does not say is an error, not a guess:
whether FFNs are gated follows from the activation only where all known models with it are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fxfusion.cost.layer_forms import HEADS, KV_HEADS, LAYERS, WIDTH, LayerForm, layer_forms
from fxfusion.cost.layer_table import Layer, LayerTable, published_tables
from fxfusion.errors import OptionError
from fxfusion.plan.policy import describe

_CONFIG = "config.json"
_MAX_BYTES = 2**24
_HIDDEN = ("hidden_size", "n_embd", "d_model", "hidden_dim")
_ACTIVATION = ("hidden_act", "activation_function", "hidden_activation", "activation")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GATED = frozenset({"silu", "swish", "swiglu", "geglu", "reglu"})
_SLIDING = "sliding_attention"
_PATTERNS = ("layer_switch", "sliding_window_pattern", "max_window_layers")  # other ways to say which layers slide


class UndecidedError(OptionError):
    """A config does not say something that its model would show."""


def read_table(source: str | os.PathLike[str], *, gated: bool | None = None) -> LayerTable:
    """The table of a published model by name, or of a file or folder. Raises `OptionError` that names file and field.

    `gated`: whether FFNs have three matrices; None: what the config says, or `UndecidedError`.
    """
    name = os.fspath(source)
    path = Path(name)
    if name in published_tables() and not path.is_file():
        return LayerTable.published(name)
    if path.is_dir():
        path = path / _CONFIG
    if not path.is_file():
        tables = ", ".join(published_tables())
        raise OptionError(f"{name}: no such file or folder with a {_CONFIG}, and no table of that name ({tables})")
    fields = _read(path)
    if "blocks" in fields or "layers" in fields:
        return LayerTable.read(path)
    title = path.parent.resolve().name if path.name == _CONFIG else path.stem
    return table_of_config(fields, title, where=str(path), gated=gated)


def table_of_config(
    fields: Mapping[str, Any], name: str, *, where: str = "config", gated: bool | None = None
) -> LayerTable:
    """The table that a config describes. `where`: what errors call it."""
    sizes, fields = sizes_of_config(fields, where), _text_part(fields)
    reader = _Fields(fields, where)
    experts = reader.number(_EXPERTS, None)
    if experts is not None and experts > 1:
        raise OptionError(f"{where}: a mixture of {experts} experts; the cost model knows dense FFNs")
    try:
        forms = layer_forms(fields)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
    layers = _alike_layers(reader, sizes["hidden_size"]) if forms is None else _own_layers(reader, forms, sizes)
    known = reader.gated() if gated is None else gated
    try:
        return LayerTable(name=name, source=where, gated=known, blocks=layers, **sizes)
    except ValidationError as error:
        raise OptionError(f"{where}: {describe(error, LayerTable)}") from None


def sizes_of_config(fields: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """What layers share, as fields of a `LayerTable`: hidden size, heads, vocabulary. Raises `OptionError`."""
    fields = _text_part(fields)
    reader = _Fields(fields, where)
    heads = reader.number(HEADS)
    one_kv_head = fields.get("multi_query") is True and not fields.get("new_decoder_architecture")
    return {
        "hidden_size": reader.number(_HIDDEN),
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if one_kv_head else reader.number(KV_HEADS, heads),
        "head_dim": reader.number(("head_dim",), None),
        "vocab_size": reader.number(("vocab_size",)),
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings") or False),
    }


def width_of_config(fields: Mapping[str, Any], where: str = "config") -> int | None:
    """Channels of an FFN, where a config has one number for all."""
    found: int | None = _Fields(_text_part(fields), where).number(WIDTH, None)
    return found


def _text_part(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config that has others."""
    inner = fields.get("text_config")
    if not isinstance(inner, Mapping):
        return fields
    return {**inner, "tie_word_embeddings": fields.get("tie_word_embeddings", inner.get("tie_word_embeddings"))}


class _Fields:
    """Fields of a config under any of their names."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def number(self, names: Sequence[str], default: Any = ...) -> Any:
        """The first of the names that has a value: a whole number above 0."""
        name = next((name for name in names if self.fields.get(name) is not None), None)
        if name is None:
            if default is ...:
                raise OptionError(f"{self.where}: it has no {' or '.join(names)}")
            return default
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{self.where}: {name}: expected a whole number above 0, got {value!r}")
        return value

    def gated(self) -> bool:
        name = next((name for name in _ACTIVATION if self.fields.get(name) is not None), None)
        if name is None or str(self.fields[name]).lower() not in _GATED:
            given = "no activation" if name is None else f"{name} {self.fields[name]!r}"
            raise UndecidedError(f"{self.where}: {given} does not tell whether FFNs are gated (three matrices or two)")
        return True


def windows_of_config(fields: Mapping[str, Any], count: int) -> list[int | None]:
    """How far back each layer's attention reaches [tokens], None: to the start; as `layer_types` say, if they do."""
    kinds = fields.get("layer_types") or [None] * count
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    return [window if kind == _SLIDING else None for kind in kinds[:count]] + [None] * (count - len(kinds))


def _alike_layers(reader: _Fields, hidden: int) -> tuple[Layer, ...]:
    width = reader.number(WIDTH, None)
    if width is None and "n_inner" not in reader.fields:
        raise OptionError(f"{reader.where}: it has no {' or '.join(WIDTH)}")
    width = 4 * hidden if width is None else width  # n_inner: null means that
    return tuple(
        Layer(attention=True, ffn_width=width, window=window) for window in _windows(reader, reader.number(LAYERS))
    )


def _own_layers(reader: _Fields, forms: Sequence[LayerForm], sizes: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Layers that the config lists one by one."""
    places = [int(form.place.partition(".")[0]) for form in forms]
    windows = _windows(reader, 1 + max(places, default=-1))
    found = []
    for form, place in zip(forms, places, strict=True):
        heads = form.number(HEADS, reader.fields)
        if form.attention and heads != sizes["num_attention_heads"]:
            raise OptionError(
                f"{reader.where}: layer {form.place} has {heads} heads, others {sizes['num_attention_heads']}, and the "
                "cost model knows one number of heads"
            )
        width = form.number(WIDTH, reader.fields)
        if width is None and "n_inner" in reader.fields:
            width = 4 * sizes["hidden_size"]
        if form.ffn and width is None:
            raise OptionError(f"{reader.where}: it has no {' or '.join(WIDTH)}")
        kv_heads = form.number(KV_HEADS, reader.fields) if form.attention else None
        window = windows[place] if form.attention else None
        width = width if form.ffn else None
        found.append(Layer(attention=form.attention, ffn_width=width, num_key_value_heads=kv_heads, window=window))
    return tuple(found)


def _windows(reader: _Fields, count: int) -> list[int | None]:
    """How far back the attention of each layer reaches, for all kinds that are known."""
    window = reader.number(("sliding_window",), None) if reader.fields.get("use_sliding_window", True) else None
    kinds = reader.fields.get("layer_types") or [None] * count
    if len(kinds) != count:
        raise OptionError(f"{reader.where}: layer_types: expected {count} entries, got {len(kinds)}")
    unknown = {str(kind) for kind in kinds if kind is not None} - {"full_attention", _SLIDING}
    if unknown:
        words = f"layer_types: {min(unknown)!r} is unknown; full_attention and {_SLIDING} can be costed"
        raise OptionError(f"{reader.where}: {words}")
    pattern = next((name for name in _PATTERNS if reader.fields.get(name)), None)
    if window and reader.fields.get("layer_types") is None and pattern is not None:
        raise UndecidedError(f"{reader.where}: {pattern} tells which layers have a sliding window, not layer_types")
    return [window if kind is None or kind == _SLIDING else None for kind in kinds]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise OptionError(f"{path}: larger than any table or config ({_MAX_BYTES} bytes)")
        found = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise OptionError(f"{path}: expected fields with values")
    return found
