"""Stacks of FFNs with a norm on their output, and their parallel form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.helpers import HIDDEN, Gated, Rms, Stack, randomise

MakeNorm = Callable[[int], nn.Module]


class PostBlock(nn.Module):
    """x + scale * output(ffn(norm(x))); `flat`: the FFN and both norms see `[tokens, hidden]`."""

    def __init__(
        self, ffn: nn.Module, output: nn.Module, norm: nn.Module | None = None, scale: float = 1.0, flat: bool = False
    ) -> None:
        super().__init__()
        self.ffn, self.output, self.norm = ffn, output, norm or nn.Identity()
        self.scale, self.flat = scale, flat

    def branch(self, n: Tensor) -> Tensor:
        found: Tensor = self.output(self.ffn(n))
        return found if self.scale == 1.0 else found * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return x + self.branch(self.norm(x.reshape(-1, x.shape[-1]))).view(x.shape)
        return x + self.branch(self.norm(x))


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


def post_parallel(model: Stack, x: Tensor, norm: Literal["fold", "last"] = "fold") -> Tensor:
    """All members read x, through the last one's norm with `"last"`; each has its own norm on its output."""
    total = x
    for member in model.layers:
        total = total + member.branch((model.layers[-1] if norm == "last" else member).norm(x))
    return total
