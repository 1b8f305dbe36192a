"""Blocks that look like FFNs and must not be fused, each for a reason of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfusion.testing import spec
from fxfusion.testing.blocks import Norm

# The branch reads the stream only, is computed from it token by token or not at all, and is added to it.
STREAM_CHANGERS = ("scaled_stream",)


class NotFfn(nn.Module):
    """`forward(x, earlier)` is the stream after the block and what else the block gives out (a list).

    x: the stream, `[batch, seq, hidden]`; earlier: the stream one block before.
    """

    def __init__(self, given: spec.NotFfn, hidden: int, tokens: tuple[int, int]) -> None:
        super().__init__()
        self.kind = given.kind
        self.norm = Norm("rms", hidden)
        self.up = nn.Linear(hidden, hidden, bias=False)
        self.down = nn.Linear(hidden, hidden, bias=False)
        self.middle = nn.Linear(hidden, hidden, bias=False) if given.kind == "three_linears" else None
        self.token_bias = nn.Parameter(torch.empty(tokens[1], hidden)) if given.kind == "token_bias" else None
        self.experts = nn.Parameter(torch.empty(2, hidden, hidden)) if given.kind == "router" else None

    def forward(self, x: Tensor, earlier: Tensor) -> tuple[Tensor, list[Tensor]]:
        extra: list[Tensor] = []
        n = self.norm(x)
        h = F.silu(self.up(n))
        if self.kind == "one_linear":
            h = n
        elif self.middle is not None:
            h = F.silu(self.middle(h))
        elif self.experts is not None:
            h = self._routed(h, self.experts)
        elif self.kind == "channel_flip":
            h = h + h.flip(-1)
        elif self.kind == "second_input":
            h = h * earlier
        elif self.token_bias is not None:
            h = h + self.token_bias
        elif self.kind == "detach":
            h = h.detach()
        elif self.kind == "inner_read":
            extra.append(h)
        elif self.kind == "reads_earlier":
            h = F.silu(self.up(self.norm(earlier)))
        b = self.down(h)
        if self.kind == "norm_of_a_sum":
            b = self.norm(b + n)
        if self.kind == "tied_outside":
            extra.append(F.linear(earlier, self.up.weight))
        return (x * 0.5 if self.kind in STREAM_CHANGERS else x) + b, extra

    @staticmethod
    def _routed(h: Tensor, experts: Tensor) -> Tensor:
        weights, chosen = torch.topk(torch.softmax(h[..., :2], dim=-1), 1)
        out = torch.zeros_like(h)
        for expert in range(2):
            out = out + torch.where(chosen == expert, weights, 0.0) * (h @ experts[expert])
        return out
