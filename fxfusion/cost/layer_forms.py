"""What a config.json says of single layers, in whatever schema, as one table. Nothing of a folder's code is needed.

    nemotron-nas   "block_configs": [{"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 5.25}}, ...]
    AnyModel       "block_configs": [{"attention": {"num_key_value_heads": 8}, "ffn": {"intermediate_size": 896}}, ...]
    transformers   "per_layer_config": {"1": {"skip": ["attention"]}, "2": {"intermediate_size": 384}}
    fxfusion       the same with "skip_returns": what is skipped goes by module path; "further" blocks follow a layer

Keys are those of NVIDIA's own readers: `block_config.py` of the Llama-Nemotron folders (51B, Super-49B, Ultra-253B) and
of Model-Optimizer (modelopt/torch/puzzletron), whose vLLM adapter writes `per_layer_config` with "attention" and "mlp"
in `skip`; transformers' `integrations/heterogeneity` since 5.19. Those drop what they do not know, with a warning. Here
a key that is not listed and has a value stops, by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fxfusion.errors import OptionError

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_groups")
BLOCKS, PER_LAYER, KNOWN = "block_configs", "per_layer_config", "fxfusion_layers"
"""Keys of config.json. `KNOWN`: the table itself, in configs in memory."""

WIDTH_MULTIPLE = 256  # FFNs given by a multiplier are as wide as the next multiple
_FURTHER, _OWN, _RETURNS = "further", "own_parameters", "skip_returns"
_SKIPPED = {"attention": "attention", "self_attn": "attention", "mlp": "ffn", "ffn": "ffn"}
_UNCHANGED = ["argument", 0, None, 0, False]  # what stands for a norm that is left out
# Read below, or of no influence on what is computed.
_READ = {
    "attention": ("no_op", "n_heads_in_group", "num_key_value_heads", "weights_precision"),
    "ffn": ("no_op", "ffn_mult", "intermediate_size", "hidden_act", "weights_precision"),
}
_PRECISIONS = (None, "bf16", "fp16", "fp32")  # others are stored with scales
_NOT_READ = ("subblock_configs", "parallel_blocks")  # beside the blocks
_MAX_LAYERS = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """One layer. `settings`: of the config, for this layer alone. `own`: shapes of small parameters that the family has
    not there, by name in the layer. `place`: in the folder's list of layers, such as "3" or "3.further.0"."""

    attention: bool = True
    ffn: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, list[int]] = field(default_factory=dict)
    place: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def number(self, names: Sequence[str], fields: Mapping[str, Any]) -> int | None:
        """What the layer has under one of these names, else the whole model."""
        found = (given.get(name) for given in (self.settings, fields) for name in names)
        return next((value for value in found if value is not None), None)


def layer_forms(fields: Mapping[str, Any]) -> tuple[LayerForm, ...] | None:
    """The layers that the content of a config.json lists; None where it lists none, so that all are alike.

    Raises `OptionError` that names a key which is unknown, contradicts another, or asks for what is not computed here.
    """
    given = [name for name in (BLOCKS, PER_LAYER, KNOWN) if fields.get(name) is not None]
    if len(given) > 1:
        raise OptionError(f"{given[0]} and {given[1]} both say what layers are")
    for name in _NOT_READ:
        if fields.get(name):
            raise OptionError(f"{name} is not supported")
    if not given:
        return None
    reader = {BLOCKS: _of_blocks, PER_LAYER: _of_overrides, KNOWN: _of_table}[given[0]]
    return tuple(reader(fields[given[0]], fields))


def unlisted(fields: Mapping[str, Any], forms: Sequence[LayerForm]) -> dict[str, Any]:
    """The same config without what it lists by layer: as many layers as there are forms, all alike.

    Lists of one entry for each layer follow; a null that all layers say for themselves takes the first one's value.
    """
    ours = (BLOCKS, PER_LAYER, KNOWN, _FURTHER, _OWN, _RETURNS, "allow_global_per_layer_attribute_access")
    counted = next((name for name in LAYERS if name in fields), LAYERS[0])
    count = fields.get(counted)
    found = {name: value for name, value in fields.items() if name not in ours}
    places = [int(form.place.partition(".")[0]) for form in forms]
    if places != list(range(len(places))):
        for name, value in found.items():
            if isinstance(value, list) and len(value) == count:
                found[name] = [value[place] for place in places]
    for name in {name for form in forms for name in form.settings}:
        having = [form.settings.get(name) for form in forms if (form.ffn if name in WIDTH else form.attention)]
        if found.get(name) is None and None not in having:
            found[name] = having[0]
    return found | {counted: len(forms)}


def _of_blocks(blocks: Any, fields: Mapping[str, Any]) -> Iterator[LayerForm]:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise OptionError(f"{BLOCKS}: expected a list of blocks")
    count = fields.get("num_hidden_layers", len(blocks))
    if count != len(blocks):
        raise OptionError(f"{BLOCKS} has {len(blocks)} entries for num_hidden_layers = {count!r}")
    for number, block in enumerate(blocks):
        where = f"{BLOCKS}[{number}]"
        if not isinstance(block, Mapping) or not {"attention", "ffn"} <= block.keys():
            raise OptionError(f'{where} must be {{"attention": {{...}}, "ffn": {{...}}}}, not {block!r}')
        _refuse_others(where, block, ("attention", "ffn"))
        attention, ffn = (_part(f"{where}.{name}", block[name], name) for name in ("attention", "ffn"))
        settings: dict[str, Any] = {}
        if attention is not None:
            settings["num_key_value_heads"] = _kv_heads(f"{where}.attention", attention, fields)
        if ffn is not None:
            settings["intermediate_size"] = _width(f"{where}.ffn", ffn, fields)
        yield LayerForm(attention=attention is not None, ffn=ffn is not None, settings=settings, place=str(number))


def _part(where: str, part: Any, kind: str) -> Mapping[str, Any] | None:
    """Attention or FFN of a block; None where it has none."""
    if part is None:
        return None
    if not isinstance(part, Mapping):
        raise OptionError(f"{where}: expected fields with values, got {part!r}")
    if part.get("no_op") and part.get("replace_with_linear"):
        raise OptionError(f"{where} has both no_op and replace_with_linear")
    _refuse_others(where, part, _READ[kind])
    if part.get("weights_precision") not in _PRECISIONS:
        raise OptionError(f"{where}.weights_precision = {part['weights_precision']!r} is not supported")
    no_op = part.get("no_op")
    if no_op not in (None, True, False):
        raise OptionError(f"{where}.no_op = {no_op!r} must be true or false")
    return None if no_op else part


def _refuse_others(where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in found.items():
        if name not in known and value:
            raise OptionError(f"{where}.{name} = {value!r} is not supported")


def _kv_heads(where: str, part: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    heads = next((fields[name] for name in HEADS if isinstance(fields.get(name), int)), 0)
    group, count = part.get("n_heads_in_group"), part.get("num_key_value_heads")
    if group is not None and (type(group) is not int or group < 1 or heads % group):
        raise OptionError(f"{where}.n_heads_in_group = {group!r} must divide the {heads} attention heads")
    if count is None and group is None:
        raise OptionError(f"{where} has n_heads_in_group = None, and no num_key_value_heads")
    found = heads // group if count is None and group is not None else count
    if type(found) is not int or found < 1 or heads % found or (group is not None and heads // group != found):
        beside = "" if group is None else f", and n_heads_in_group = {group}"
        raise OptionError(f"{where}.num_key_value_heads = {found!r} must divide the {heads} attention heads{beside}")
    return found


def _width(where: str, part: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    """`intermediate_size`, or 2/3 of `ffn_mult` times the hidden size, up to the next multiple of 256."""
    width, multiplier, hidden = part.get("intermediate_size"), part.get("ffn_mult"), fields.get("hidden_size")
    if part.get("hidden_act") not in (None, fields.get("hidden_act")):
        raise OptionError(
            f"{where}.hidden_act = {part['hidden_act']!r} is not the model's {fields.get('hidden_act')!r}"
        )
    if width is not None and (type(width) is not int or width < 1):
        raise OptionError(f"{where}.intermediate_size = {width!r} must be a whole number above 0")
    if multiplier is None:
        if width is None:
            raise OptionError(f"{where} has ffn_mult = None, and no intermediate_size")
        return width
    if type(multiplier) not in (int, float) or not 0 < multiplier < 2**20 or type(hidden) is not int:
        raise OptionError(f"{where}.ffn_mult = {multiplier!r} must be a positive number")
    found = math.ceil(int(2 * multiplier * hidden / 3) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if width not in (None, found):
        raise OptionError(f"{where}.intermediate_size = {width}, and ffn_mult = {multiplier} says {found}")
    return found


def _of_overrides(overrides: Any, fields: Mapping[str, Any]) -> Iterator[LayerForm]:
    count = next((fields[name] for name in LAYERS if name in fields), None)
    if type(count) is not int or not 0 < count <= _MAX_LAYERS or not isinstance(overrides, Mapping):
        raise OptionError(f"{PER_LAYER}: expected overrides by layer, and a number of layers, got {count!r}")
    by_path = fields.get(_RETURNS)
    for name in overrides:
        if not str(name).isdecimal() or int(name) >= count:
            raise OptionError(f"{PER_LAYER}: {name!r} is none of the {count} layers")
    known = {int(name): given for name, given in overrides.items()}
    for number in range(count):
        where, given = f"{PER_LAYER}.{number}", known.get(number, {})
        if not isinstance(given, Mapping):
            raise OptionError(f"{where}: expected fields with values, got {given!r}")
        skip = _skipped(where, given.get("skip") or (), by_path)
        yield LayerForm(
            attention="attention" not in skip,
            ffn="ffn" not in skip,
            place=str(number),
            **_settings(where, given, fields),
        )
        further = (given.get(_FURTHER) or ()) if by_path is not None else ()
        for place, block in enumerate(further):
            inner = f"{where}.{_FURTHER}[{place}]"
            if not isinstance(block, Mapping):
                raise OptionError(f"{inner}: expected fields with values, got {block!r}")
            own = _settings(inner, block, fields)
            yield LayerForm(attention=False, place=f"{number}.{_FURTHER}.{place}", **own)


def _skipped(where: str, names: Any, by_path: Mapping[str, Any] | None) -> set[str]:
    """Which of attention and FFN a layer has not. By module path a layer is without its FFN alone."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise OptionError(f"{where}.skip: expected a list of names, got {names!r}")
    if by_path is not None:
        unknown = [name for name in names if name not in by_path]
        found = {"ffn" for name in names if name not in unknown and by_path[name] != _UNCHANGED}
    else:
        unknown = [name for name in names if name not in _SKIPPED]
        found = {_SKIPPED[name] for name in names if name not in unknown}
    if unknown:
        raise OptionError(f"{where}.skip: {unknown[0]!r} is not supported")
    return found


def _settings(where: str, given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `LayerForm`: overrides that change the sizes of a layer. Those that repeat the model's are none."""
    settings: dict[str, Any] = {}
    ours = fields.get(_RETURNS) is not None
    own = (given.get(_OWN) or {}) if ours else {}
    for name, value in given.items():
        if name == "skip" or (ours and name in (_OWN, _FURTHER)) or value == fields.get(name):
            continue
        if name not in (*WIDTH, *HEADS, *KV_HEADS):
            raise OptionError(f"{where}.{name} = {value!r} is not supported")
        if type(value) is not int or value < 1:
            raise OptionError(f"{where}.{name} = {value!r} must be a whole number above 0")
        settings[name] = value
    if not isinstance(own, Mapping) or not all(isinstance(shape, list) for shape in own.values()):
        raise OptionError(f"{where}.{_OWN}: expected shapes by name, got {own!r}")
    return {"settings": settings, "own": {name: list(shape) for name, shape in own.items()}}


def _of_table(entries: Any, fields: Mapping[str, Any]) -> Iterator[LayerForm]:
    try:
        yield from (LayerForm(**entry) for entry in entries)
    except TypeError as error:
        raise OptionError(f"{KNOWN} cannot be read: {error}") from None
