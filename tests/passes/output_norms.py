"""Stacks of FFNs with a norm on their output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import HIDDEN, Block, Gated, Rms, Stack, randomise

MakeNorm = Callable[[int], nn.Module]


class PostBlock(Block):
    """x + scale * output(ffn(norm(x))); `flat`: the FFN and both norms see `[tokens, hidden]`."""

    def __init__(
        self, ffn: nn.Module, output: nn.Module, norm: nn.Module | None = None, scale: float = 1.0, flat: bool = False
    ) -> None:
        super().__init__(norm or nn.Identity(), ffn)
        self.output = output
        self.scale, self.flat = scale, flat

    def branch(self, n: Tensor) -> Tensor:
        found: Tensor = self.output(self.ffn(n))
        return found if self.scale == 1.0 else found * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return x + self.branch(self.norm(x.reshape(-1, x.shape[-1]))).view(x.shape)
        return super().forward(x)


def post_stack(
    output: MakeNorm = Rms,
    norm: MakeNorm | None = None,
    widths: Sequence[int] = (12, 12, 12),
    ffn: Callable[..., nn.Module] = Gated,
    dtype: torch.dtype = torch.float64,
    hidden: int = HIDDEN,
    **block: Any,
) -> Stack:
    """One block for each width, random."""
    blocks = [
        PostBlock(ffn(hidden=hidden, width=width), output(hidden), norm(hidden) if norm else None, **block)
        for width in widths
    ]
    model = Stack(blocks)
    randomise(model, dtype=dtype)
    return model
