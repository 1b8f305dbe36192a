"""By which settings of its config a family builds a layer of these sizes: found by building layers, on the meta device.

    {"intermediate_size": 384}                                         a wide FFN
    {"num_attention_heads": 8, "num_key_value_heads": 4}               a wide attention
    {"own_parameters": {"mlp.up_proj.bias": [384]}}                    a bias that took up the norm's shift

No name of a family's settings is known here: it is the one that, changed, gives the layer's tensors their shapes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fxfusion.checkpoints.listed_layers import index_argument, table_of
from fxfusion.checkpoints.per_layer.stack import Block
from fxfusion.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
OWN = "own_parameters"
_HEADS = re.compile(r"heads?$")  # num_heads, n_head, num_key_value_heads; no head_dim
_MOST = 4  # settings, or numbers of heads together, for one layer


class LayerSettings:
    """Settings of single layers. `config`: of the model, as the folder says it for all layers."""

    def __init__(self, layer: type[Any], config: Any) -> None:
        self._layer, self._config, self._index = layer, config, index_argument(layer)
        self._known: dict[Any, dict[str, Any]] = {}
        self._listed = [dict(form.settings) for form in table_of(config)]

    def of(self, block: Block, place: int) -> dict[str, Any]:
        """What the layer at this place needs to have the tensors of a block; empty where it has them.

        Raises `CheckpointError` that names the tensor, where no setting gives them.
        """
        wanted = {name: tuple(value.shape) for name, value in block.module.state_dict(keep_vars=True).items()}
        listed = self._listed[block.number] if block.number < len(self._listed) else {}
        key = (tuple(wanted.items()), tuple(block.skip), *sorted(listed.items()))
        if key not in self._known:
            self._known[key] = self._search(wanted, block, place, listed)
        return dict(self._known[key])

    def _search(self, wanted: Shapes, block: Block, place: int, listed: Mapping[str, Any]) -> dict[str, Any]:
        usual = vars(self._config)
        chosen = {name: value for name, value in listed.items() if usual.get(name) != value}
        found = self._shapes(chosen, block.skip, place)
        if found is None:
            raise CheckpointError(f"{self._layer.__name__} cannot be built by its config alone")
        for _ in range(_MOST):
            if not (off := _different(wanted, found)):
                return chosen
            best = len(off)
            for change in self._candidates(wanted, found, off):
                shapes = self._shapes({**chosen, **change}, block.skip, place)
                if shapes is not None and len(_different(wanted, shapes)) < best:
                    best, found, added = len(_different(wanted, shapes)), shapes, change
            if best == len(off):
                break
            chosen |= added
        off = _different(wanted, found)
        large = [name for name in off if name not in wanted or len(found.get(name, wanted[name])) > 1]
        if not large:
            return {**chosen, OWN: {name: list(wanted[name]) for name in off}} if off else chosen
        name = large[0]
        one, other = (list(shapes[name]) if name in shapes else "not there" for shapes in (wanted, found))
        raise CheckpointError(
            f"layer {block.number}: {name} is {one}, and no setting of {type(self._config).__name__} gives a layer "
            f"like this (it would be {other}); format='canonical' holds every model"
        )

    def _candidates(self, wanted: Shapes, found: Shapes, off: Iterable[str]) -> Iterator[dict[str, Any]]:
        pairs = [pair for name in off for pair in zip(wanted.get(name, ()), found.get(name, ()), strict=False)]
        sizes = sorted({size for name in off for size in wanted.get(name, ())})
        plain = {name: value for name, value in vars(self._config).items() if not name.startswith("_")}
        for times in sorted({one // other for one, other in pairs if other and one > other and one % other == 0}):
            heads = {name: value * times for name, value in plain.items() if type(value) is int and _HEADS.search(name)}
            yield from [heads] if heads else []
        for name, value in plain.items():
            if type(value) is bool:
                yield {name: not value}
            elif type(value) is int or value is None:
                yield from ({name: size} for size in sizes if size != value)

    def _shapes(self, changes: Mapping[str, Any], skip: Iterable[str], place: int) -> Shapes | None:
        """Of the tensors of a layer with these settings, without what is left out; None where there is no such."""
        own = copy.copy(self._config)
        index = {} if self._index is None else {self._index: place}
        try:
            for name, value in changes.items():
                setattr(own, name, value)
            with torch.device("meta"):
                layer = self._layer(own, **index)
        except Exception:  # whatever a class makes of a setting that is none
            return None
        tensors = layer.state_dict(keep_vars=True).items()
        prefixes = tuple(f"{path}." for path in skip)
        return {name: tuple(value.shape) for name, value in tensors if not name.startswith(prefixes)}


def _different(one: Shapes, other: Shapes) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]
