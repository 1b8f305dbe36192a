"""middle_normed: a norm over each member's own channels, in any spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.errors import RefusalCode
from fxfusion.graph import ops
from tests.helpers import (
    Block,
    Rms,
    Stack,
    assert_exact,
    assert_fuses,
    customs,
    error_of,
    fuse,
    parallel_form,
    randomise,
    refusal_with,
    tokens,
)
from tests.passes.output_norms import PostBlock


class Inner(nn.Module):
    """down(norm(silu(gate(n)) * up(n))): a norm over this member's own channels."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, width, bias=False), nn.Linear(8, width)
        self.down, self.inner = nn.Linear(width, 8), norm(width)

    def forward(self, n: Tensor) -> Tensor:
        return self.down(self.inner(F.silu(self.gate(n)) * self.up(n)))


def inner_stack(*ffns: nn.Module) -> Stack:
    model = Stack([Block(Rms(8), ffn) for ffn in ffns])
    randomise(model)
    return model


@pytest.mark.parametrize("widths", [(12, 12, 12), (4, 12, 20)])
@pytest.mark.parametrize("inner", [nn.LayerNorm, Rms, nn.RMSNorm, lambda _: nn.Softmax(-1)])
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_a_norm_over_the_channels_of_each_member(widths: tuple[int, ...], inner: Any, norm: Any) -> None:
    model, x = inner_stack(*(Inner(width, inner) for width in widths)), tokens().requires_grad_()
    fused, report = fuse(model, x, policy={"norm": norm}, verify="numeric")
    assert [(group.form, len(group.members)) for group in report.groups] == [("concatenated", 3)]
    assert sum(ops.op_name(node) == "linear" for node in fused.graph.nodes) == 3
    got, wanted = fused(x), parallel_form(model, x, norm=norm)
    assert_exact(got, wanted, torch.float64)
    one, other = (torch.autograd.grad(value.square().sum(), x)[0] for value in (got, wanted))
    assert_exact(one, other, torch.float64, gradient=True)
    assert error_of(model(x), wanted) > 1e-3


SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in one axis": lambda m, h: F.layer_norm(h.view(-1, 12), (12,)).view(2, 5, 12),
    "axes counted from the front": lambda m, h: h * h.square().mean(2, keepdim=True).rsqrt() * m.a,
    "before the activation": lambda m, h: torch.tanh(F.rms_norm(h, (12,), m.a) * m.one),
    "a number of another dtype": lambda m, h: F.rms_norm(h * m.a.sum().float(), (12,)),
    "a vector and a number": lambda m, h: F.normalize(h * m.a, dim=-1) + m.two,
}


@pytest.mark.parametrize("middle", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("how", ["symbolic", "dynamo"])
def test_spellings_of_inner_norms(middle: Callable[[Any, Tensor], Tensor], how: Any) -> None:
    assert_fuses(customs(lambda m, x: F.linear(middle(m, F.linear(x, m.w1, m.b1)), m.w2)), tokens(), how=how)


def _on_flat_tokens(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.rms_norm(F.silu(F.linear(x.reshape(-1, 8), m.w1)).view(2, 5, 12), (12,)).view(-1, 12), m.w2).view(
        2, 5, 8
    )


def _as_it_is(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.rms_norm(F.silu(F.linear(x, m.w1)), (12,)), m.w2)


@pytest.mark.parametrize("order", [1, -1])
def test_members_on_flat_tokens_join_others(order: int) -> None:
    assert_fuses(customs(*[_on_flat_tokens, _as_it_is, _as_it_is][::order]), tokens(), how="symbolic")


def test_inner_and_output_norms_together() -> None:
    model, x = Stack([PostBlock(Inner(width), Rms(8), Rms(8)) for width in (4, 12)]), tokens()
    randomise(model)
    fused, report = fuse(model, x, verify="numeric")
    assert [group.form for group in report.groups] == ["grouped"]
    assert_exact(fused(x), parallel_form(model, x), torch.float64)
    assert error_of(model(x), parallel_form(model, x)) > 1e-3


def test_another_inner_norm_does_not_fit() -> None:
    model, x = inner_stack(Inner(12), Inner(12, lambda width: nn.LayerNorm(width, eps=1e-3))), tokens()
    fused, report = fuse(model, x)
    assert not report.groups and torch.equal(fused(x), model(x))
    refusal_with(report.refusals, RefusalCode.DIFFERENT_LITERAL, "0.001")
