"""Sees writes to weights that torch does not count, by reading a few of their elements again.

`p.data.mul_(2)`, an optimizer's own kernel, numpy, DLPack, NCCL or another process with the same memory leave the
version of a tensor as it is. A probe remembers some elements of each weight, bit by bit, and compares: all elements of
weights of up to 64, else 8, one in each eighth of every axis (a Latin hypercube). So on the CPU a write to a quarter of
the rows or of the columns of one weight, in one piece, is seen for certain if it changes what it writes, and a write
that leaves single elements as they were (bfloat16 rounds small changes away) is seen very likely. A write to a few
elements is not.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import torch

PLACES = 8
"""Elements that are read of each larger weight."""
SMALL = 64
"""Elements of a weight up to which all are read."""
_WORD = 8  # bytes
_USER_SPACE = 1 << 48  # bytes; no process has data above


class MemoryProbe:
    """Some elements of weights on the CPU, read at their addresses: one gather for all of them, a few microseconds.

    It keeps no tensor and no storage alive, and so it must not be asked before the caller knows, in this very call,
    that each weight is where it was: its address and its storage are the same, and the caller holds the weight. Then
    the memory is there, as much as it is for the layer that reads it next. Words of 8 bytes that hold an element's
    first or last byte are read whole; they are aligned, so they never reach into another page.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        words = set[int]()
        for weight in weights:
            address, last = weight.data_ptr(), weight.element_size() - 1
            for offset in _offsets(weight.shape, weight.stride(), weight.element_size()):
                words.update(((address + offset) // _WORD - 1, (address + offset + last) // _WORD - 1))
        self._places = torch.tensor(sorted(words), dtype=torch.int64, device="cpu")
        self._words = self._read()

    def same(self) -> bool:
        """Whether the elements are what they were, bit by bit."""
        return torch.equal(self._read(), self._words)

    def _read(self) -> torch.Tensor:
        return torch.index_select(_memory(), 0, self._places)


class DeviceProbe:
    """Some elements of weights on one device, through views that live for one call: a diagonal of each weight."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._bytes = _read_diagonals(weights)
        self._answer: _Answer | None = None

    def same(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether the elements are what they were; waits for the device."""
        return torch.equal(_read_diagonals(weights), self._bytes)

    def was_same(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether they were when this was last asked; asks the device anew and does not wait for it."""
        if weights[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True  # what is captured is not asked when it is replayed
        before, self._answer = self._answer, _Answer((_read_diagonals(weights) != self._bytes).any())
        return before is None or not before.get()


class _Answer:
    """A flag on its way from a device."""

    def __init__(self, flag: torch.Tensor) -> None:
        kind = flag.device.type
        self._flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=kind == "cuda")
        self._flag.copy_(flag, non_blocking=True)
        self._event = None if kind == "cpu" else torch.Event(device=flag.device)
        if self._event is not None:
            self._event.record()

    def get(self) -> bool:
        if self._event is not None:
            self._event.synchronize()  # waits for what was asked a call ago, not for what was queued since
        return bool(self._flag)


@cache
def _memory() -> torch.Tensor:
    """A window over this process's memory from address 8 on, as words of 8 bytes. It owns nothing."""
    return torch.frombuffer((ctypes.c_int64 * (_USER_SPACE // _WORD - 1)).from_address(_WORD), dtype=torch.int64)


@lru_cache(maxsize=1024)
def _offsets(shape: torch.Size, strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Bytes from a weight's first element to those that are read: the same for every weight that looks so."""
    return tuple(
        size * sum(place * stride for place, stride in zip(places, strides, strict=True)) for places in _places(shape)
    )


def _places(shape: torch.Size) -> Iterator[tuple[int, ...]]:
    """Which elements are read, as indices."""
    if shape.numel() <= SMALL:
        yield from itertools.product(*map(range, shape))
        return
    dice = random.Random(0)
    axes = [
        [int((part + dice.random()) * length / PLACES) for part in dice.sample(range(PLACES), PLACES)]
        for length in shape
    ]
    yield from zip(*axes, strict=True)


def _read_diagonals(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bytes of the elements, in an order that depends on dtypes and order of the weights."""
    views = defaultdict[torch.dtype, list[torch.Tensor]](list)
    for weight in weights:
        views[weight.dtype].append(_diagonal(weight.detach()))
    return torch.cat([torch.cat(parts).view(torch.uint8) for parts in views.values()])


def _diagonal(weight: torch.Tensor) -> torch.Tensor:
    """All of a small weight; else 8 elements, in equal steps along every axis at once, from the middle of the first."""
    if weight.numel() <= SMALL:
        return weight.reshape(-1)
    steps = [length // PLACES for length in weight.shape]
    start = sum(step // 2 * stride for step, stride in zip(steps, weight.stride(), strict=True))
    step = sum(step * stride for step, stride in zip(steps, weight.stride(), strict=True))
    return weight.as_strided((PLACES,), (step,), weight.storage_offset() + start)
