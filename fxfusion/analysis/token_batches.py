"""Batches made ready for measures that run the same text many times: read once, checked, with a digest each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfusion.analysis.batches import IGNORED, Batch, as_inputs, split_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One batch. `inputs`: those of the model, without labels. `key`: digest of all that was given.

    `seen` `bool [batch, seq]`: tokens whose values count, neither padding nor labelled -100. `targets`
    `[batch, seq - 1]`: the next token at each position; `counted` likewise: whether its prediction counts.
    """

    number: int
    inputs: dict[str, Any]
    seen: Tensor
    targets: Tensor
    counted: Tensor
    key: str


def read_batches(batches: Iterable[Batch]) -> tuple[TokenBatch, ...]:
    """All batches, in order.

    Raises ValueError for no batches, token ids of a wrong shape, sequences of one token, or no token that
    counts; TypeError for a batch that is neither a tensor nor a dict.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of batches; wrap a single batch in a list")
    found = tuple(_read(batch, number) for number, batch in enumerate(batches))
    if not found:
        raise ValueError("batches is empty: nothing to measure on (a generator can be used up only once)")
    if not any(batch.counted.any() for batch in found):
        raise ValueError("no token counts: all of them are padding, or labelled -100, or alone in their sequence")
    return found


def _read(batch: Any, number: int) -> TokenBatch:
    given = as_inputs(batch, number)
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batch {number} must hold integer `input_ids` [batch, seq], got {kind}")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"batch {number} is {list(ids.shape)}: it takes a sequence of at least two tokens")
    labels, inputs = split_targets(given, number)
    if labels.shape != ids.shape:
        raise ValueError(f"the labels of batch {number} are {list(labels.shape)}, its ids {list(ids.shape)}")
    seen = torch.ones(ids.shape, dtype=torch.bool)
    for name, ignored in (("attention_mask", 0), ("labels", IGNORED)):
        if given.get(name) is not None:
            seen &= given[name].cpu() != ignored
    targets = labels[:, 1:].cpu()
    key = _digest(given)
    return TokenBatch(number=number, inputs=inputs, seen=seen, targets=targets, counted=targets != IGNORED, key=key)


def _digest(inputs: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()[:16]
