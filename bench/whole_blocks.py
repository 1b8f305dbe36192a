"""The paper's appendix B: windows of whole blocks in parallel, picked by the dependency matrix.

    x + (B_a(x) - x) + ... + (B_b(x) - x)           B: a decoder layer, attention and FFN one after the other

Source: arXiv 2503.18908, appendix B (the greedy pick) and table 7.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fxfusion.models.fingerprint import decoder_layers


def pick_windows(dependency: Tensor, size: int) -> list[tuple[int, ...]]:
    """Disjoint windows of `size` blocks, the most independent first: least `M_max`, then least `M_sum`, over the
    entries between its blocks (`dependency[i, j]`: how much block j changes without block i)."""
    count = len(dependency)
    windows = [tuple(range(first, first + size)) for first in range(count - size + 1)]

    def rank(window: tuple[int, ...]) -> tuple[float, float]:
        inside = dependency[window[0] : window[-1] + 1, window[0] : window[-1] + 1].triu(1)
        return float(inside.max()), float(inside.sum())

    chosen: list[tuple[int, ...]] = []
    for window in sorted(windows, key=rank):
        if not any(set(window) & set(other) for other in chosen):
            chosen.append(window)
    return chosen


class _Parallel(nn.Module):
    """Decoder layers that all read the first one's input."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total = hidden
        for block in self.blocks:
            found = block(hidden, *args, **kwargs)
            total = total + (found if isinstance(found, Tensor) else found[0]) - hidden
        return total


class _Nothing(nn.Module):
    """Stands where a layer went into a window: numbers of layers stay."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def parallel_blocks(model: nn.Module, windows: Sequence[Sequence[int]]) -> Callable[[Tensor], Tensor]:
    """Logits of the model with windows of whole blocks in parallel, in eager PyTorch. The model stays as it is."""
    memo = {id(weight): weight for weight in [*model.parameters(), *model.buffers()]}
    turned = copy.deepcopy(model, memo)
    layers = decoder_layers(turned)[1]
    for window in windows:
        blocks = [layers[layer] for layer in window]
        for layer in window:
            layers[layer] = _Nothing()
        layers[window[0]] = _Parallel(blocks)

    def logits(input_ids: Tensor) -> Tensor:
        found: Tensor = turned(input_ids=input_ids, use_cache=False).logits
        return found

    return logits
