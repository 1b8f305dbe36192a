"""Quantised weights of the members as one quantised weight, without quantising anew.

    integers [width_i, hidden], scales [width_i, hidden / 32]   ->  rows of all, scales too
    integers [hidden, width_i], scales [hidden, 1]              ->  columns of all; a scale for each member's block

Exact: a weight is integers and a scale (and zero point) for each block of them, and blocks may be cut into smaller
ones with the same scale. What multiplies weights (a norm's gain, a scale after the FFN) cannot be folded into integers.

Which tensors can be joined is told by their parts, not by their class: `qdata` of the weight's own shape, `block_size`,
and one `scale` for each block, as plain weight-only tensors of torchao have them. Packed layouts do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fxfusion.errors import SurgeryError

FUSE_FIRST = "fuse first, then quantise"
_PER_BLOCK = ("scale", "zero_point")
Places = Sequence[tuple[slice, slice]]  # where channels go in the whole, and where they come from


def is_quantised(weight: object) -> bool:
    """Whether this is a quantised weight that can be joined with others."""
    integers, blocks = getattr(weight, "qdata", None), getattr(weight, "block_size", None)
    if not isinstance(weight, Tensor) or not isinstance(integers, Tensor) or blocks is None or weight.dim() != 2:
        return False
    if any(value is not None for name, value in _settings(weight).items() if name.startswith("act")):
        return False  # the scales of activations would become those of all members together
    parts, whole = _parts(weight), tuple(weight.shape)
    if integers.shape != whole or len(blocks) != 2 or "scale" not in parts or set(parts) - {"qdata", *_PER_BLOCK}:
        return False
    counts = tuple(size // block for size, block in zip(whole, blocks, strict=True))
    return all(tuple(parts[name].shape) == counts for name in _PER_BLOCK if name in parts)


def plain(weight: Tensor) -> Tensor:
    """The numbers that a weight stands for."""
    return cast(Tensor, cast(Any, weight).dequantize()) if is_quantised(weight) else weight


@torch.no_grad()
def joined(weights: Sequence[Tensor], places: Sequence[Places], dim: int, size: int) -> Tensor:
    """One quantised weight of `size` channels along `dim` (0: rows, 1: columns), from parts of several.

    Raises `SurgeryError` where it does not stand for the same numbers.
    """
    runs = (edge for place in places for pair in place for part in pair for edge in (part.start, part.stop))
    block = common_block(weights, runs if dim else ())
    fine = [_refined(weight, block) for weight in weights]
    first = fine[0]
    shape = [size if axis == dim else length for axis, length in enumerate(weights[0].shape)]
    parts = {}
    for name, example in first.items():
        step = (1, 1) if name == "qdata" else (1, block)
        whole = example.new_empty([length // unit for length, unit in zip(shape, step, strict=True)])
        for own, place in zip(fine, places, strict=True):
            for target, source in place:
                _along(whole, dim, target, step[dim]).copy_(_along(own[name], dim, source, step[dim]))
        parts[name] = whole
    wide = _rebuilt(weights[0], parts, block)
    _check(wide, weights, places, dim)
    return wide


def _check(wide: Tensor, weights: Sequence[Tensor], places: Sequence[Places], dim: int) -> None:
    numbers = plain(wide)
    for weight, place in zip(weights, places, strict=True):
        own = plain(weight)
        for target, source in place:
            if not torch.equal(_along(numbers, dim, target, 1), _along(own, dim, source, 1)):
                raise SurgeryError(f"weights of class {type(wide).__name__} could not be joined: {FUSE_FIRST}")


def _along(tensor: Tensor, dim: int, channels: slice, unit: int) -> Tensor:
    own = slice(channels.start // unit, -(-channels.stop // unit), channels.step)
    return tensor[own] if dim == 0 else tensor[:, own]


def _refined(weight: Tensor, block: int) -> dict[str, Tensor]:
    """The parts of a weight with a scale for each row and each `block` columns."""
    rows, columns = cast(Any, weight).block_size
    parts = _parts(weight)
    for name in _PER_BLOCK:
        if name in parts:
            parts[name] = parts[name].repeat_interleave(rows, 0).repeat_interleave(columns // block, 1)
    return parts


def _parts(weight: Any) -> dict[str, Tensor]:
    names = (*getattr(weight, "tensor_data_names", ()), *getattr(weight, "optional_tensor_data_names", ()))
    return {name: getattr(weight, name) for name in names if getattr(weight, name, None) is not None}


def _settings(weight: Any) -> dict[str, Any]:
    names = (*getattr(weight, "tensor_attribute_names", ()), *getattr(weight, "optional_tensor_attribute_names", ()))
    return {name: getattr(weight, name) for name in names}


def kind_of(weight: Tensor) -> tuple[Any, ...]:
    """What must be the same for weights to be joined."""
    if not is_quantised(weight):
        return (type(weight),)
    settings = {name: repr(value) for name, value in _settings(weight).items() if name != "block_size"}
    parts = {name: part.dtype for name, part in _parts(weight).items()}
    return (type(weight), tuple(settings.items()), tuple(parts.items()))


def _rebuilt(example: Any, parts: Mapping[str, Tensor], block: int) -> Tensor:
    settings = _settings(example)
    settings["block_size"] = type(settings["block_size"])([1, block])
    return cast(Tensor, type(example)(**parts, **settings))


def common_block(weights: Sequence[Tensor], edges: Iterable[int]) -> int:
    """The widest block along the columns that the blocks of all weights, cut at these edges, consist of."""
    return math.gcd(*(cast(Any, weight).block_size[1] for weight in weights), *edges)
