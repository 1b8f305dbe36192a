"""Which slot of the key-value cache each surviving attention uses, and the config that builds such a cache.

    layer   0     1     2     3     4     5         types by layer: F S F S F S, attention of 0 and 3 dropped
    slot    -     1     2     -     0     3         used slots are 0..3, of types F S F S; 4 and 5 hold nothing

A cache has one slot for each decoder layer, built from `config.layer_types`; its length is read from the first
slots, so those must be in use. Where all layers are of one type, survivors are numbered in order. A model reads
`config.layer_types` by layer too, for its masks, so where types are mixed, entries of surviving layers stay: a
survivor keeps its slot if it can, later ones move into the slots that came free, and the entry of a dropped layer,
which no mask is made for, takes the type of the survivor that moved into that slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.errors import SurgeryError

_INDEX_NAME = re.compile("layer|idx|index")
_SHARING = "kv_sharing_modes"  # "reuse" makes a slot that stores nothing, in all caches built from the config
_SHARED_AT_END = "num_kv_shared_layers"  # before there was that: a cache without the last so many slots
SHARING_NAMES = (_SHARING, _SHARED_AT_END)
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """`slots`: for each decoder layer its slot, or None. `layer_types`: for each slot its type, None where the config
    lists none."""

    slots: tuple[int | None, ...]
    layer_types: tuple[str, ...] | None

    @property
    def unused(self) -> tuple[int, ...]:
        taken = set(self.slots)
        return tuple(slot for slot in range(len(self.slots)) if slot not in taken)


def plan_slots(survivors: Iterable[int], layers: int, types: Sequence[str] | None, fixed_types: bool) -> CacheSlots:
    """Give each surviving attention (by its layer) a slot, so that slots 0..k-1 are all used.

    `types`: what each layer's mixer is. With `fixed_types` (a config that computes its list) and more than one type,
    every survivor keeps its own slot, as the types cannot move along.
    """
    kept = sorted(survivors)
    slots: list[int | None] = [None] * layers
    if types is not None and fixed_types and len(set(types)) > 1:
        for layer in kept:
            slots[layer] = layer
        return CacheSlots(tuple(slots), tuple(types))
    moved = None if types is None else list(types)
    for layer, slot in _compact(kept, types).items():
        slots[layer] = slot
        if moved is not None and types is not None:
            moved[slot] = types[layer]
    if moved is None or not kept:
        return CacheSlots(tuple(slots), None if types is None else tuple(types))
    # No type may be met first in an unused slot: mask sizes are read from the first slot of each type.
    for slot in set(range(len(kept), layers)) - set(kept):
        moved[slot] = moved[0]
    return CacheSlots(tuple(slots), tuple(moved))


def _compact(kept: Sequence[int], types: Sequence[str] | None) -> dict[int, int]:
    """Slots 0..k-1, in the order of the layers if no survivor stands where a slot of another type would have to be
    (a cache that is moved to the host slot by slot counts on the order), else with as few moves as possible."""
    in_order = {layer: slot for slot, layer in enumerate(kept)}
    if types is None or all(slot not in in_order or types[slot] == types[layer] for layer, slot in in_order.items()):
        return in_order
    free = [slot for slot in range(len(kept)) if slot not in in_order]
    return {layer: layer if layer < len(kept) else free.pop(0) for layer in kept}


def index_attributes(mixers: Mapping[int, Sequence[nn.Module]], slots: Mapping[int, int]) -> tuple[str, ...]:
    """Names of the attributes by which the mixers know their cache slot: those that equal it in every layer.

    `mixers`: the modules of each layer's mixer, inner ones included; `slots`: its slot as of now.
    """
    names: set[str] | None = None
    for layer, modules in mixers.items():
        found = [(name, value) for module in modules for name, value in vars(module).items() if is_index(name, value)]
        present, others = {name for name, _ in found}, {name for name, value in found if value != slots[layer]}
        names = (present if names is None else names & present) - others
    return tuple(sorted(names or ()))


def set_slots(
    mixers: Mapping[int, Sequence[nn.Module]], names: Sequence[str], slots: CacheSlots, undo: ExitStack
) -> None:
    """Tell each surviving mixer its slot."""
    for layer, modules in mixers.items():
        for module in modules:
            for name in names:
                if is_index(name, vars(module).get(name)):
                    set_attribute(module, name, slots.slots[layer], undo)


def set_config(configs: Iterable[Any], slots: CacheSlots, undo: ExitStack) -> None:
    """Make the configs build caches with these slots, unused ones empty for good.

    A slot that could store something and never does would make the cache look as if it was not begun.
    """
    unused = set(slots.unused)
    at_end = len(slots.slots) - 1 - max(set(range(len(slots.slots))) - unused, default=-1)
    for config in configs:
        types = getattr(config, "layer_types", None)
        if slots.layer_types is not None and types is not None and tuple(types) != slots.layer_types:
            set_attribute(config, "layer_types", list(slots.layer_types), undo)
        if not is_computed(config, _SHARING):
            modes = ["reuse" if slot in unused else None for slot in range(len(slots.slots))]
            set_attribute(config, _SHARING, modes, undo)
            if at_end and _stores(new_cache(config).layers[-1]):
                set_attribute(config, _SHARED_AT_END, at_end, undo)


def check_slots(config: Any, before: Any, old: Sequence[int | None], slots: CacheSlots) -> None:
    """Raises `SurgeryError` unless a cache built from the config has, for each survivor, the kind of slot it had.

    `before`: such a cache from before, with the slots `old`. This sees what no short run can: the length of a
    sliding window.
    """
    after = new_cache(config)
    for layer, slot in enumerate(slots.slots):
        if slot is None:
            continue
        had, has = before.layers[old[layer]], after.layers[slot]
        if type(had) is not type(has) or _plain(had) != _plain(has):
            raise SurgeryError(
                f"the attention of layer {layer} would get a cache slot of another kind: "
                f"{type(has).__name__} {_plain(has)} instead of {type(had).__name__} {_plain(had)}"
            )
    used = [after.layers[slot] for slot in slots.slots if slot is not None]
    if any(_counts(before.layers[slot]) for slot in old if slot is not None) and not any(map(_counts, used)):
        raise SurgeryError(
            "every attention of this hybrid would go, and what is left keeps no count of tokens in the cache, which "
            "the model reads; leave one of them"
        )
    last = max((slot for slot in slots.slots if slot is not None), default=-1)
    holes = [slot for slot in slots.unused if slot < last and _stores(after.layers[slot])]
    if holes:
        raise SurgeryError(
            "the config computes its layer_types, so surviving attention must keep its cache slot, and slot "
            f"{holes[0]} would stay empty among used ones, which this version of transformers does not support"
        )


def new_cache(config: Any) -> Any:
    """An empty cache, as `generate` makes it."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def decoder_configs(model: nn.Module, layer_list: str, layers: int) -> list[Any]:
    """The configs that the decoder's modules read and that caches are built from, each once.

    Raises `SurgeryError` where there is none for so many layers.
    """
    from transformers import PreTrainedConfig

    owners = [model, *(module for path, module in model.named_modules() if _on_the_way(path, layer_list))]
    found: dict[int, Any] = {}
    for owner in owners:
        config = getattr(owner, "config", None)
        if isinstance(config, PreTrainedConfig):
            decoder = config.get_text_config(decoder=True)
            if getattr(decoder, "num_hidden_layers", None) == layers:
                found[id(decoder)] = decoder
    if not found:
        raise SurgeryError(f"no config of the model is one of its {layers} decoder layers (num_hidden_layers)")
    return list(found.values())


def refuse_sharing(configs: Iterable[Any]) -> None:
    """Raises `SurgeryError` where the configs of an intact model let layers share keys and values."""
    for config in configs:
        modes = getattr(config, _SHARING, None) or ()
        if (getattr(config, _SHARED_AT_END, None) or 0) > 0 or any(mode is not None for mode in modes):
            raise SurgeryError(f"some layers use the keys and values of others ({_SHARED_AT_END}): not supported")


def forget_sharing(configs: Iterable[Any]) -> None:
    """Take back what `set_config` said of slots without use; intact models share none (`refuse_sharing`)."""
    for config in configs:
        if getattr(config, _SHARED_AT_END, None):
            setattr(config, _SHARED_AT_END, 0)


def set_attribute(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute; `undo` puts the old one back."""
    old = getattr(owner, name, _ABSENT)
    undo.callback(*((delattr, owner, name) if old is _ABSENT else (setattr, owner, name, old)))
    setattr(owner, name, value)


def is_computed(config: Any, name: str) -> bool:
    """Whether the config's class computes the attribute (perhaps under another name), so that it cannot be set."""
    found = getattr(type(config), getattr(type(config), "attribute_map", {}).get(name, name), None)
    return isinstance(found, property) and found.fset is None


def is_index(name: str, value: Any) -> bool:
    """Whether an attribute may be the number of a layer or cache slot."""
    return isinstance(value, int) and not isinstance(value, bool) and _INDEX_NAME.search(name) is not None


def _plain(slot: Any) -> dict[str, Any]:
    """Numbers and flags that a slot was made with."""
    return {name: value for name, value in vars(slot).items() if isinstance(value, (bool, int, str))}


def _stores(slot: Any) -> bool:
    return hasattr(slot, "lazy_initialization")


def _counts(slot: Any) -> bool:
    """Whether a slot knows how many tokens it has seen; the state of a recurrent mixer does not."""
    return hasattr(slot, "get_seq_length")


def _on_the_way(path: str, layer_list: str) -> bool:
    """Whether a module holds the decoder layers or is part of them."""
    return layer_list == path or layer_list.startswith(f"{path}.") or path.startswith(f"{layer_list}.")
