"""build_wide: one norm, wide projections, one activation; member by member where it is computed over the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.compiler.pipeline import FusedGraph, fuse_captured
from fxfusion.errors import RefusalCode
from fxfusion.graph import ops
from fxfusion.passes import choose_form
from fxfusion.passes.choose_form import Target
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import (
    Block,
    Gated,
    Plain,
    Rms,
    Stack,
    assert_exact,
    assert_fuses,
    capture,
    customs,
    error_of,
    fuse,
    match,
    parallel_form,
    randomise,
    refusal_with,
    stack,
    tokens,
)
from tests.passes.output_norms import PostBlock, post_stack


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


def test_the_matcher_says_so() -> None:
    with_norm, without = (
        match(customs(lambda m, x, f=f: F.linear(f(F.linear(x, m.w1)), m.w2)), tokens(), how="symbolic").ffns[0]
        for f in (lambda h: F.layer_norm(h, (12,)), torch.tanh)
    )
    assert with_norm.segmented and not without.segmented


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


class Learned(nn.Module):
    """An activation with a learned number, or one for each channel, as several families have."""

    def __init__(self, width: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.alpha = nn.Parameter(torch.ones(shape))

    def forward(self, n: Tensor) -> Tensor:
        h = self.up(n)
        alpha = F.softplus(self.alpha)
        return self.down(torch.where(h > 0, alpha * h * h, (torch.expm1(h) - h) * alpha))


@pytest.mark.parametrize("per_channel", [False, True])
def test_learned_activations_lie_side_by_side(per_channel: bool) -> None:
    widths = (12, 4, 8)
    model = inner_stack(*(Learned(width, (width,) if per_channel else (1,)) for width in widths))
    fused, report = fuse(model, tokens(), verify="numeric")
    assert [(group.form, len(group.members)) for group in report.groups] == [("concatenated", 3)]
    assert_exact(fused(tokens()), parallel_form(model, tokens()), torch.float64)
    wanted = parallel_form(model, tokens())
    with torch.no_grad():
        model.layers[1].ffn.alpha.add_(0.5)
    assert error_of(parallel_form(model, tokens()), wanted) > 1e-4, "the vectors make no difference"


# --- weights in oneDNN's layout ------------------------------------------------------------------------

PACKED = torch.ops.fxfusion.packed_linear.default


def compiled_for(model: nn.Module, x: Tensor, form: Any) -> tuple[FusedGraph, Tensor]:
    """The fused graph, proved, and what it computes."""
    captured = capture(model, x)
    found = fuse_captured(captured, FusionPolicy(), verify="numeric", compiled_for=Target(request=form))
    packed = [value for pack in found.packs for value in pack.module(*[captured.values[name] for name in pack.sources])]
    return found, found.module(*captured.inputs, *packed)[0]


def linears(found: FusedGraph) -> list[object]:
    return [node.target for node in found.module.graph.nodes if node.target in (F.linear, PACKED)]


@pytest.mark.parametrize("make", [stack, lambda: stack(Plain, nn.LayerNorm)], ids=["gated", "plain with biases"])
def test_every_wide_linear_layer_is_packed_and_right(make: Callable[[], Stack]) -> None:
    model, x = make().float(), tokens().float()
    found, result = compiled_for(model, x, "prepacked")
    assert set(linears(found)) == {PACKED} and len(found.packs) == 1
    assert "pack_weight" in found.packs[0].module.code
    assert_exact(result, parallel_form(model, x), torch.float32)
    proof, *_ = found.report.verifications
    assert proof["passed"] and proof["dtype"] == "float32"
    with torch.no_grad():
        next(model.layers[1].ffn.parameters())[0, 0] += 1.0
    assert error_of(result, parallel_form(model, x)) > 1e-4


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("ffn", [Gated, Plain], ids=["gated", "plain with biases"])
def test_members_with_norms_on_their_outputs(
    ffn: type[nn.Module], in_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own down projections are packed too, unless they are float32 and in cache."""
    if not in_cache:
        monkeypatch.setattr(choose_form, "CACHE", 0)
    model, x = post_stack(norm=Rms, ffn=ffn, widths=(12, 4, 20)).float(), tokens().float()
    found, result = compiled_for(model, x, "prepacked")
    downs = [F.linear if in_cache else PACKED] * 3
    assert linears(found) == [PACKED] * (2 if ffn is Gated else 1) + downs and len(found.packs) == 1
    assert_exact(result, parallel_form(model, x), torch.float32)
    (group,) = found.report.groups
    left = ("down", "fc2") if in_cache else ()
    matrices = [name for name, value in model.named_parameters() if value.dim() == 2]
    weights = sum(model.get_parameter(name).numel() for name in matrices if not any(part in name for part in left))
    assert (group.form, group.packed_bytes) == ("grouped_prepacked", 4 * weights)
    with torch.no_grad():
        model.layers[1].output.weight[0] += 1.0
    assert error_of(result, parallel_form(model, x)) > 1e-4


@pytest.mark.parametrize("form", ["concatenated", "members"])
@pytest.mark.parametrize("make", [stack, lambda: post_stack(norm=Rms)])
def test_other_forms_are_not_prepacked(make: Callable[[], Stack], form: str) -> None:
    """By members, in parallel form on their own weights, nothing is packed at all."""
    model, x = make().float(), tokens().float()
    found, result = compiled_for(model, x, form)
    assert set(linears(found)) == {F.linear} and len(found.packs) == (form == "concatenated")
    wanted = parallel_form(model, x)
    assert_exact(result, wanted, torch.float32)
    assert error_of(model(x), wanted) > 1e-3
    if form == "members":
        assert len(linears(found)) == 9 and found.report.groups[0].packed_bytes == 0
        assert [row["part"] for row in found.report.verifications] == ["group 0", "whole graph", "clean-up"]
