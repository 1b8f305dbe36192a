"""Take decoder layers out of a model, and let its config and its key-value cache follow.

    layers 0 1 2 3 4 5, of which 2 and 3 go  ->  layers 0 1 2 3, the last two were 4 and 5

Lists with one entry per layer in the config lose the entries of the layers that go. Surviving attentions keep
their order in the cache, in slots of their own type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models import cache_slots
from fxfusion.models.drop_record import DropRecord, read_record
from fxfusion.models.ffn_surgery.snapshot import Changes, Snapshot

_COUNT = re.compile("layer|depth|block")
FOLLOWS_SLOTS = ("layer_types", "kv_sharing_modes")  # written by cache_slots


@dataclass(slots=True, kw_only=True)
class DepthEditor:
    """What must follow the number of layers of one model.

    `layers`: the decoder layers as they were. `mixers`: of each layer that has attention, its modules; `slots`: the
    cache slot of each, `cache`: an empty one, both as they were. `types`: of the layers, in order, None where the
    config lists none. `snapshot`: of all that may change.
    """

    model: nn.Module
    path: str
    layers: tuple[nn.Module, ...]
    configs: Sequence[Any]
    mixers: Mapping[int, Sequence[nn.Module]]
    index_names: tuple[str, ...]
    slots: Mapping[int, int]
    cache: Any
    types: Sequence[str] | None
    snapshot: Snapshot

    @classmethod
    def of(cls, model: nn.Module, path: str, mixers: Mapping[int, Sequence[nn.Module]]) -> DepthEditor:
        """Raises `SurgeryError` where the cache cannot follow."""
        layers = tuple(model.get_submodule(path).children())
        configs = cache_slots.decoder_configs(model, path, len(layers))
        record = read_record(cast(Any, model).config)
        types = getattr(configs[0], "layer_types", None) if record is None else record.layer_types
        names, slots = _slots_now(mixers, len(layers), record)
        if mixers and not names and hasattr(configs[0], "use_cache"):
            raise SurgeryError("how the attention finds its slot of the key-value cache cannot be told")
        owners = [*configs, *_ancestors(model, path), *(module for layer in layers for module in layer.modules())]
        return cls(
            model=model,
            path=path,
            layers=layers,
            configs=configs,
            mixers=mixers,
            index_names=names,
            slots=slots,
            cache=cache_slots.new_cache(configs[0]) if names else None,
            types=types,
            snapshot=Snapshot.of(owners),
        )

    def without(self, gone: Iterable[int]) -> None:
        """The model without some layers of those it had at first."""
        left_out = set(gone)
        kept = [layer for layer in range(len(self.layers)) if layer not in left_out]
        self.put([self.layers[layer] for layer in kept])
        for owner in (*self.configs, *_ancestors(self.model, self.path)):
            self._follow(owner, kept)
        if self.mixers and self.index_names:
            self._renumber(kept)

    def put(self, layers: Sequence[nn.Module]) -> None:
        """Make these the decoder layers."""
        put_layers(self.model, self.path, layers)

    def changes(self) -> Changes:
        return self.snapshot.changes()

    def _follow(self, owner: Any, kept: Sequence[int]) -> None:
        before = next(values for known, values in self.snapshot.before if known is owner)
        for name, value in before.items():
            if cache_slots.is_computed(owner, name):
                continue
            if type(value) is int and value == len(self.layers) and _COUNT.search(name):
                setattr(owner, name, len(kept))
            elif isinstance(value, (list, tuple)) and len(value) == len(self.layers) and name not in FOLLOWS_SLOTS:
                setattr(owner, name, type(value)(value[layer] for layer in kept))
            elif are_layers(name, value, len(self.layers)):
                setattr(owner, name, type(value)(kept.index(layer) for layer in value if layer in kept))

    def _renumber(self, kept: Sequence[int]) -> None:
        survivors = {place: self.mixers[layer] for place, layer in enumerate(kept) if layer in self.mixers}
        types = None if self.types is None else [self.types[layer] for layer in kept]
        fixed = any(cache_slots.is_computed(config, "layer_types") for config in self.configs)
        if fixed and list(self.configs[0].layer_types) != types:
            raise SurgeryError("the config computes its layer_types, and not those of the layers that would be left")
        slots = cache_slots.plan_slots(survivors, len(kept), types, fixed)
        with ExitStack() as undo:
            cache_slots.set_slots(survivors, self.index_names, slots, undo)
            for config in self.configs:
                if slots.layer_types is not None and hasattr(config, "layer_types") and not fixed:
                    config.layer_types = list(slots.layer_types)
            cache_slots.forget_sharing(self.configs)  # of when there were more layers
            cache_slots.set_config(self.configs, slots, undo)
            old = [self.slots.get(layer) for layer in kept]
            cache_slots.check_slots(self.configs[0], self.cache, old, slots)
            undo.pop_all()


def are_layers(name: str, value: Any, count: int) -> bool:
    """Whether an attribute is a list of numbers of layers."""
    if not isinstance(value, (list, tuple)) or not value or not _COUNT.search(name):
        return False
    return all(type(item) is int and 0 <= item < count for item in value) and len(set(value)) == len(value)


def put_layers(model: nn.Module, path: str, layers: Sequence[nn.Module]) -> None:
    """Make these the entries of a list of modules; the list stays the same object."""
    holder: Any = model.get_submodule(path)
    del holder[:]
    for layer in layers:
        holder.append(layer)


def _slots_now(
    mixers: Mapping[int, Sequence[nn.Module]], count: int, record: DropRecord | None
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Names of the attributes by which attentions know their cache slot, and the slots: as recorded when some were
    dropped, else by layer or one after the other."""
    guesses: list[dict[int, int]] = [{layer: layer for layer in range(count)}]
    guesses.append({layer: place for place, layer in enumerate(sorted(mixers))})
    if record is not None:
        guesses.insert(0, {layer: slot for layer, slot in enumerate(record.cache_slots) if slot is not None})
    for slots in guesses:
        names = cache_slots.index_attributes(mixers, slots) if set(mixers) <= set(slots) else ()
        if names:
            return names, slots
    return (), {}


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that hold the list of layers, outermost first."""
    steps = path.split(".")[:-1]
    return [model.get_submodule(".".join(steps[:end])) for end in range(len(steps) + 1)]
