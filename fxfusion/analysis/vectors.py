"""Lengths and angles of the residual stream's values, token by token, whatever precision the model runs in.

    cosine distance of u and v:   1 - u . v / (|u| |v|)  =  |u / |u| - v / |v||^2 / 2

The second form loses nothing where the two are close, and close is what most of them are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxfusion.errors import CaptureError
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import Run


def block_nodes(block: ResidualBlock) -> tuple[fx.Node, ...]:
    """What a run must keep for `contribution`."""
    return block.branches or (block.before, block.after)


def contribution(run: Run, block: ResidualBlock, seen: Tensor) -> Tensor:
    """What the block adds to the stream at the tokens that count: `[tokens, hidden]`, float32 or wider.

    From its branches, where there are any: `after - before` has the rounding error of the whole stream, which
    in half precision can be as large as what a small block adds.
    """
    if block.branches:
        first, *others = (pick(run[branch], seen) for branch in block.branches)
        return sum(others, first)
    return pick(run[block.after], seen) - pick(run[block.before], seen)


def pick(value: Tensor, seen: Tensor) -> Tensor:
    """A value `[batch, seq, hidden]` or `[batch * seq, hidden]` at the tokens that count, `seen` `[batch, seq]`.

    Returns `[tokens, hidden]` in float32, or float64 where it is that already.
    """
    shape = tuple(value.shape[:-1])
    if shape not in (tuple(seen.shape), (seen.numel(),)):
        raise CaptureError(f"the residual stream is {list(value.shape)}, not [batch, seq, hidden]; tokens are in doubt")
    flat = value.reshape(-1, value.shape[-1])
    if not seen.all():
        flat = flat[seen.flatten().to(flat.device)]
    return flat if flat.dtype is torch.float64 else flat.float()


@dataclass(frozen=True, slots=True)
class Directions:
    """Vectors of length one. `units`: `[tokens, hidden]`, zero where the vector was; `is_zero`: `[tokens]`."""

    units: Tensor
    is_zero: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Directions:
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        return cls(vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny), lengths[..., 0] == 0)


def cosine_distance(one: Directions, other: Directions) -> Tensor:
    """`[tokens]`. Two zero vectors are equal (0), a zero vector is as far from any other as can be told (1)."""
    distance = (one.units - other.units).square().sum(dim=-1) / 2
    return distance.masked_fill(one.is_zero ^ other.is_zero, 1.0)


def sums_by_sequence(values: Tensor, seen: Tensor) -> Tensor:
    """Sums over each sequence's tokens: values `[tokens]`, picked by `seen` `[batch, seq]`, to float64 `[batch]`."""
    rows = seen.nonzero()[:, 0].to(values.device)
    totals = torch.zeros(len(seen), dtype=torch.float64, device=values.device)
    totals.index_add_(0, rows, values.double())
    return totals.cpu()
