"""One linear layer in whatever spelling; a constant on the left or a bias of activations is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.errors import RefusalCode
from fxfusion.passes.match_linear import match_linear
from tests.helpers import (
    Stack,
    assert_fuses,
    assert_not_fused,
    capture,
    customs,
    facts_of,
    nodes_named,
    tokens,
)

Spelling = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

# (module, value, weight [out, in], bias [out]) -> value W^T + b, in 3-D
SPELLINGS: dict[str, Spelling] = {
    "linear": lambda m, v, w, b: F.linear(v, w, b),
    "linear by keywords": lambda m, v, w, b: F.linear(input=v, weight=w, bias=b),
    "linear and a sum": lambda m, v, w, b: F.linear(v, w) + b,
    "matmul with T": lambda m, v, w, b: v @ w.T + b,
    "matmul with mT": lambda m, v, w, b: torch.matmul(v, w.mT) + b,
    "matmul with t()": lambda m, v, w, b: torch.matmul(v, w.t()) + b,
    "matmul with transpose": lambda m, v, w, b: v @ w.transpose(0, 1) + b,
    "matmul with transpose from the end": lambda m, v, w, b: v @ w.transpose(-2, -1) + b,
    "matmul with permute": lambda m, v, w, b: v @ w.permute(1, 0) + b,
    "addmm": lambda m, v, w, b: torch.addmm(b, v.view(-1, v.shape[-1]), w.t()).view(2, 5, -1),
    "mm": lambda m, v, w, b: torch.mm(v.reshape(10, -1), w.t()).reshape(2, 5, -1) + b,
    "a weight computed from a parameter": lambda m, v, w, b: F.linear(v, w * 0.5 + 0.1, b),
}


@pytest.mark.parametrize("linear", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_fuses(linear: Spelling) -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        h = F.gelu(linear(m, F.rms_norm(x, (8,), m.g), m.w1, m.b1))
        return linear(m, h, m.w2, m.b2)

    assert_fuses(customs(branch), tokens())


def conv1d(branch_bias: bool) -> Stack:
    """Weights stored `[in, out]`, as Conv1D modules do: `wide` serves as `[in, out]` of both layers."""

    def branch(m: Any, x: Tensor) -> Tensor:
        first, second = m.w2, m.w1  # [8, 12], [12, 8]
        flat = x.view(-1, 8)
        h = F.gelu(torch.addmm(m.b1, flat, first)) if branch_bias else F.gelu(flat @ first)
        out = torch.addmm(m.b2, h, second) if branch_bias else h @ second
        return out.view(2, 5, 8)

    return customs(branch)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_stored_in_by_out_fuse(bias: bool) -> None:
    assert_fuses(conv1d(bias), tokens())


def test_square_weights_keep_their_orientation() -> None:
    """With hidden = width nothing but the spelling tells `W` from `W^T`."""

    def branch(m: Any, x: Tensor) -> Tensor:
        return (F.silu(x @ m.square) * (x @ m.w1.T)) @ m.w2

    assert_fuses(customs(branch, width=8), tokens(8, 8))


def one(function: Callable[[Any, Tensor], Tensor], name: str) -> Any:
    captured = capture(customs(function, count=1), tokens(), how="symbolic")
    return match_linear(nodes_named(captured, name)[0], facts_of(captured))


@pytest.mark.parametrize(
    ("function", "name", "transposed", "sizes", "has_bias"),
    [
        (lambda m, x: F.linear(x, m.w1, m.b1)[..., :8], "linear", False, (8, 12), True),
        (lambda m, x: (x @ m.w1.T)[..., :8], "matmul", False, (8, 12), False),
        (lambda m, x: (x @ m.w2)[..., :8], "matmul", True, (8, 12), False),
        (lambda m, x: torch.addmm(m.b1, x[0], m.w2)[..., :8], "addmm", True, (8, 12), True),
    ],
)
def test_what_is_recorded(function: Any, name: str, transposed: bool, sizes: tuple[int, int], has_bias: bool) -> None:
    linear = one(function, name)
    assert linear.transposed is transposed
    assert (linear.in_features, linear.out_features) == sizes
    assert (linear.bias is not None) is has_bias


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, x: m.square[:5, :5] @ x, "matmul"),
        (lambda m, x: x @ x.mT @ x, "matmul"),
        (lambda m, x: F.linear(x, x[0, :8].new_ones(8, 8)), "linear"),
        (lambda m, x: F.linear(x, m.square, x[0, 0]), "linear"),
        (lambda m, x: torch.addmm(x[0], x[0], m.square, beta=0.5), "addmm"),
        (lambda m, x: torch.addmm(x[0], x[0], m.square), "addmm"),
        (lambda m, x: torch.addmm(m.b2, x[0], m.square, alpha=2), "addmm"),
        (lambda m, x: torch.addmm(m.square[:5], x[0], m.square), "addmm"),
        (lambda m, x: x @ m.g[:, None].expand(2, 8, 8), "matmul"),
        (lambda m, x: F.linear(m.square, m.square)[:5] + x, "linear"),
    ],
    ids=[
        "a constant on the left",
        "two activations",
        "a weight of activations",
        "a bias of activations",
        "scaled bias",
        "a summand of activations",
        "scaled product",
        "a bias with rows",
        "a batch of weights",
        "constants only",
    ],
)
def test_what_is_no_linear_layer(function: Any, name: str) -> None:
    assert one(function, name) is None


def test_a_square_weight_on_the_left_mixes_tokens() -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        return m.w2 @ F.silu(m.w1 @ x)

    assert_not_fused(customs(branch, width=8), [tokens(8, 8)], RefusalCode.TOKEN_MIXING, "matmul")


def test_transposed_tokens_through_a_square_weight_mix_tokens() -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x.transpose(1, 2), m.w1)), m.w2).transpose(1, 2)

    assert_not_fused(customs(branch, width=8), [tokens(8, 8)], RefusalCode.TOKEN_MIXING, "transpose")
