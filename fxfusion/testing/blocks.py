"""The blocks of random stacks as torch modules: obvious, and without code of the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfusion.testing import effects, spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "square": lambda h: F.relu(h) ** 2,
}


class Norm(nn.Module):
    """A norm over the last axis in one of several spellings; `[..., hidden]` to the same shape."""

    def __init__(self, kind: spec.NormKind, hidden: int) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        gained = kind in ("rms", "rms_plus_one", "rms_manual", "layer", "layer_no_bias")
        self.weight = nn.Parameter(torch.empty(hidden)) if gained else None
        self.bias = nn.Parameter(torch.empty(hidden)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind in ("layer", "layer_no_bias", "layer_plain"):
            return F.layer_norm(x, (self.hidden,), self.weight, self.bias, 1e-5)
        if self.kind == "rms":
            return F.rms_norm(x, (self.hidden,), self.weight, 1e-6)
        assert self.weight is not None
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (1.0 + self.weight) if self.kind == "rms_plus_one" else self.weight * normed


class Conv1D(nn.Module):
    """A linear layer that stores its weight as `[in, out]` and multiplies by `addmm`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.size()[:-1] + (self.outputs,)
        return torch.addmm(self.bias, x.reshape(-1, self.weight.shape[0]), self.weight).view(shape)


class Ffn(nn.Module):
    """The branch of a feed-forward block: `forward(x)` is `output(scale * F(norm(x)))`."""

    def __init__(self, given: spec.Ffn, hidden: int) -> None:
        super().__init__()
        self.given, self.hidden = given, hidden
        self.norm, self.output = Norm(given.norm, hidden), Norm(given.output, hidden)
        self.inner = Norm(given.inner, given.width) if given.inner in ("rms", "layer") else None
        self.scale = nn.Parameter(torch.empty(hidden)) if given.scale == "layer_scale" else None
        width, bias = given.width, given.bias
        if given.layout == "conv1d":
            self.up: nn.Module = Conv1D(hidden, width)
            self.down: nn.Module = Conv1D(width, hidden)
            return
        packed = given.layout in (*spec.PACKED, "interleaved")
        self.up = nn.Linear(hidden, 2 * width if packed else width, bias=bias)
        self.gate = nn.Linear(hidden, width, bias=bias) if given.layout == "separate" else None
        self.down = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor, held: effects.Memory | None = None) -> Tensor:
        return self.with_norm(x, self.norm, held)

    def with_norm(self, x: Tensor, norm: nn.Module, held: effects.Memory | None = None) -> Tensor:
        """The branch with another block's norm; `[batch, seq, hidden]` to the same shape. `held`: for `within`."""
        shape = x.shape
        if self.given.flat:
            x = x.reshape(-1, self.hidden)
        h = _within(self.given.within, self._middle(norm(x)), held or {})
        if self.given.inner == "softmax":
            h = torch.softmax(h, dim=-1)
        elif self.inner is not None:
            h = self.inner(h)
        b: Tensor = self.down(h)
        if self.given.scale == "literal":
            b = b * 0.5
        elif self.scale is not None:
            b = self.scale * b
        b = self.output(b)
        return b.reshape(shape) if self.given.flat else b

    def _middle(self, n: Tensor) -> Tensor:
        act, width, layout = ACTIVATIONS[self.given.activation], self.given.width, self.given.layout
        h = self.up(n)
        if layout in ("plain", "conv1d"):
            return act(h)
        if self.gate is not None and layout == "separate":
            return cast(Tensor, act(self.gate(n)) * h)
        if layout == "chunk":
            gate, up = h.chunk(2, dim=-1)
        elif layout == "split":
            gate, up = torch.split(h, width, dim=-1)
        elif layout == "slices":
            gate, up = h[..., :width], h[..., width:]
        else:
            gate, up = h[..., ::2], h[..., 1::2]
        return cast(Tensor, act(gate) * up)


def _within(kind: spec.Within, h: Tensor, held: effects.Memory) -> Tensor:
    """An effect on the intermediate value, `[..., width]`."""
    if kind == "scaled":
        h.mul_(0.5)
    elif kind == "set":
        effects.put(h, (..., 0), 0.5)
    elif kind == "out":
        torch.mul(h, 0.5, out=h)
    elif kind == "dropout":
        return F.dropout(h, 0.25, True)
    elif kind == "kept":
        held["other"].copy_(h.sum())
    return h


class Mixer(nn.Module):
    """The branch of a block in which tokens see each other; `[batch, seq, hidden]` to the same shape."""

    def __init__(self, given: spec.Mixer, hidden: int, seq: int) -> None:
        super().__init__()
        self.kind = given.kind
        self.norm = Norm("rms", hidden)
        self.inside = nn.Linear(hidden, 3 * hidden if given.kind == "attention" else hidden, bias=False)
        self.outside = nn.Linear(hidden, hidden, bias=False)
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=1) if given.kind == "conv" else None
        self.tokens = nn.Parameter(torch.empty(seq, seq)) if given.kind == "token_linear" else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(self.norm(x))
        if self.kind == "attention":
            q, k, v = h.chunk(3, dim=-1)
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.conv is not None:
            h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        elif self.tokens is not None:
            h = torch.matmul(self.tokens, h)
        else:
            h = torch.cumsum(h, dim=1)
        out: Tensor = self.outside(h)
        return out


# The branch reads the stream only, is computed from it token by token or not at all, and is added to it.
STREAM_CHANGERS = ("scaled_stream",)


class NotFfn(nn.Module):
    """A block that looks like an FFN and must not be fused.

    `forward(x, earlier)` is the stream after the block and what else it gives out (a list). x: the stream, `[batch,
    seq, hidden]`; earlier: the stream one block before.
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
