"""The layers of a model from a name, a table, a Hugging Face `config.json`, or a folder with one.

A config is read by the fields that it has, in the words of many: `hidden_size`, `n_embd`, `d_model`, ... Where it lists
its blocks (`block_configs`), each has its own attention and FFN. What a config does not say is an error, not a guess:
whether FFNs are gated follows from the activation only where all known models with it are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fxfusion.cost.layer_table import Layer, LayerTable, published_tables
from fxfusion.errors import OptionError
from fxfusion.plan.policy import describe

_CONFIG = "config.json"
_MAX_BYTES = 2**24
_HIDDEN = ("hidden_size", "n_embd", "d_model", "hidden_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_groups")
_WIDTH = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
_ACTIVATION = ("hidden_act", "activation_function", "hidden_activation", "activation")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GATED = frozenset({"silu", "swish", "swiglu", "geglu", "reglu"})
_SLIDING = "sliding_attention"
_PATTERNS = ("layer_switch", "sliding_window_pattern", "max_window_layers")  # other ways to say which layers slide
_MULTIPLE = 256  # FFNs given by a multiplier are as wide as the next multiple


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
    hidden, heads, blocks = sizes["hidden_size"], sizes["num_attention_heads"], fields.get("block_configs")
    layers = _block_layers(blocks, hidden, heads, where) if blocks is not None else _alike_layers(reader, hidden)
    known = reader.gated() if gated is None else gated
    try:
        return LayerTable(name=name, source=where, gated=known, blocks=layers, **sizes)
    except ValidationError as error:
        raise OptionError(f"{where}: {describe(error, LayerTable)}") from None


def sizes_of_config(fields: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """What layers share, as fields of a `LayerTable`: hidden size, heads, vocabulary. Raises `OptionError`."""
    fields = _text_part(fields)
    reader = _Fields(fields, where)
    heads = reader.number(_HEADS)
    one_kv_head = fields.get("multi_query") is True and not fields.get("new_decoder_architecture")
    return {
        "hidden_size": reader.number(_HIDDEN),
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if one_kv_head else reader.number(_KV_HEADS, heads),
        "head_dim": reader.number(("head_dim",), None),
        "vocab_size": reader.number(("vocab_size",)),
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings") or False),
    }


def width_of_config(fields: Mapping[str, Any], where: str = "config") -> int | None:
    """Channels of an FFN, where a config has one number for all."""
    found: int | None = _Fields(_text_part(fields), where).number(_WIDTH, None)
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
    count = reader.number(_LAYERS)
    width = reader.number(_WIDTH, None)
    if width is None and "n_inner" not in reader.fields:
        raise OptionError(f"{reader.where}: it has no {' or '.join(_WIDTH)}")
    width = 4 * hidden if width is None else width  # n_inner: null means that
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
    slides = [kind is None or kind == _SLIDING for kind in kinds]
    return tuple(Layer(attention=True, ffn_width=width, window=window if each else None) for each in slides)


def _block_layers(blocks: Any, hidden: int, heads: int, where: str) -> tuple[Layer, ...]:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise OptionError(f"{where}: block_configs: expected a list of blocks")
    return tuple(_block(block, hidden, heads, f"{where}: block_configs[{index}]") for index, block in enumerate(blocks))


def _block(block: Any, hidden: int, heads: int, where: str) -> Layer:
    attention, ffn = _part(block, "attention", where), _part(block, "ffn", where)
    kv_heads = None
    if not attention.get("no_op"):
        kv_heads = attention.get("num_key_value_heads")
        group = attention.get("n_heads_in_group")
        if kv_heads is None and isinstance(group, int) and group > 0:
            kv_heads = heads // group
    width = None if ffn.get("no_op") else _width(ffn, hidden, where)
    return Layer(attention=not attention.get("no_op"), ffn_width=width, num_key_value_heads=kv_heads)


def _part(block: Any, name: str, where: str) -> Mapping[str, Any]:
    part = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(part, Mapping):
        raise OptionError(f"{where}.{name}: expected fields with values")
    if part.get("replace_with_linear"):
        raise OptionError(f"{where}.{name}: replace_with_linear: the cost model knows attention and FFNs")
    return part


def _width(ffn: Mapping[str, Any], hidden: int, where: str) -> int:
    """`intermediate_size`, or 2/3 of `ffn_mult` times the hidden size, up to the next multiple of 256."""
    width, multiplier = ffn.get("intermediate_size"), ffn.get("ffn_mult")
    if isinstance(width, int) and width > 0:
        return width
    if not isinstance(multiplier, (int, float)) or not 0 < multiplier < math.inf:
        raise OptionError(f"{where}.ffn: it has neither an intermediate_size nor a ffn_mult above 0")
    return math.ceil(int(2 * multiplier * hidden / 3) / _MULTIPLE) * _MULTIPLE


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
