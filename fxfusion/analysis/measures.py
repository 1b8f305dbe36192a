"""What each token says about a model, by its prediction and by the residual stream.

With p the reference's distribution of the next token and q the model's, both softmax of float32 logits:

    loss            -log q[target]                                         nats
    loss_increase   log p[target] - log q[target]                          nats
    kl              KL(p || q) = sum_v p[v] (log p[v] - log q[v])          nats
    top1            argmax q = argmax p; the lowest id where logits tie    0 or 1
    top5            q[argmax p] >= the fifth highest of q                  0 or 1

Where p[v] is 0 in float32, its term of the sum is 0. Equal logits give exactly 0, 0, 1, 1. Float32 resolves
the KL of one token to about 1e-6; what rounding would make negative is 0.

Lengths and angles of the residual stream's values, token by token, whatever precision the model runs in.

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

LOSS_ONLY = ("loss",)
WITH_REFERENCE = ("loss", "loss_increase", "kl", "top1", "top5")

_TOP = 5
# Elements of the float32 logits held at once (16 MB each); those of a long batch over 128k tokens take gigabytes.
_CHUNK_ELEMENTS = 2**22


def token_measures(logits: Tensor, targets: Tensor, counted: Tensor, reference: Tensor | None = None) -> Tensor:
    """The measures above for each token that counts, row by row.

    Args:
        logits: `[batch, positions, vocabulary]`, each predicting the target at its position.
        targets: `int64 [batch, positions]`.
        counted: `bool [batch, positions]`.
        reference: logits of the same shape.

    Returns:
        `float32 [tokens, measures]`, columns as in `WITH_REFERENCE`, without a reference as in `LOSS_ONLY`.
        All of a token's measures against the reference are NaN where either's logits are.
    """
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    rows, columns = counted.to(logits.device).nonzero(as_tuple=True)
    wanted = targets.to(logits.device)[rows, columns]
    parts = []
    # Picked, not multiplied by the mask: a NaN in a token that does not count must not reach the sum.
    for row, column, target in zip(rows.split(step), columns.split(step), wanted.split(step), strict=True):
        ours = logits[row, column].float()
        if reference is None:
            parts.append(_losses(ours.log_softmax(dim=-1), target)[:, None])
            continue
        theirs = reference[row.to(reference.device), column.to(reference.device)].to(logits.device).float()
        parts.append(_compare(ours, theirs, target))
    return torch.cat(parts)


def _losses(log_probabilities: Tensor, target: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, target[:, None])[:, 0]


def _compare(ours: Tensor, theirs: Tensor, target: Tensor) -> Tensor:
    """All measures of `WITH_REFERENCE` from float32 logits `[tokens, vocabulary]`: `[tokens, 5]`."""
    best = theirs.max(dim=-1).indices
    same = ours.max(dim=-1).indices == best
    least = ours.topk(min(_TOP, ours.shape[-1]), dim=-1).values[:, -1]
    near = ours.gather(-1, best[:, None])[:, 0] >= least
    log_q, log_p = ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
    loss, reference_loss = _losses(log_q, target), _losses(log_p, target)
    terms = torch.sub(log_p, log_q, out=log_q)  # in place from here on: the vocabulary is what costs
    p = log_p.exp_()
    kl = terms.mul_(p).masked_fill_(p == 0, 0.0).sum(dim=-1).clamp_(min=0.0)
    measures = torch.stack([loss, loss - reference_loss, kl, same.float(), near.float()], dim=1)
    # A comparison with NaN says no, an argmax among NaN says anything: neither is a finding.
    measures[:, 3:].masked_fill_(kl.isnan()[:, None], torch.nan)
    return measures


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
