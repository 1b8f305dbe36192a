"""build_wide: the packed tensors themselves, against values computed by hand, also in oneDNN's layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.compiler.pipeline import FusedGraph, fuse_captured
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
    capture,
    error_of,
    parallel_form,
    randomise,
    stack,
    tokens,
)
from tests.passes.output_norms import post_stack


def packed(model: Stack, **policy: object) -> list[Tensor]:
    """The packed tensors of the model's one group, in the order of the new inputs."""
    captured = capture(model, tokens(dtype=next(model.parameters()).dtype))
    fused = fuse_captured(captured, FusionPolicy.resolve(policy))
    (pack,) = fused.packs
    return list(pack.module(*[captured.values[name] for name in pack.sources]))


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gains_are_folded_into_gate_and_up() -> None:
    model = stack(Gated, widths=(4, 6))
    gate, up, down = packed(model)
    same(gate, torch.cat([layer.ffn.gate.weight * layer.norm.weight for layer in model.layers]))
    same(up, torch.cat([layer.ffn.up.weight * layer.norm.weight for layer in model.layers]))
    same(down, torch.cat([layer.ffn.down.weight for layer in model.layers], 1))


def test_shifts_become_biases() -> None:
    model = stack(Plain, nn.LayerNorm)
    fc1, bias1, fc2, bias2 = packed(model)
    same(fc1, torch.cat([layer.ffn.fc1.weight * layer.norm.weight for layer in model.layers]))
    shifted = [layer.ffn.fc1.bias + layer.ffn.fc1.weight @ layer.norm.bias for layer in model.layers]
    same(bias1, torch.cat(shifted))
    same(fc2, torch.cat([layer.ffn.fc2.weight for layer in model.layers], 1))
    same(bias2, torch.stack([layer.ffn.fc2.bias for layer in model.layers]).sum(0))


def test_norm_last_folds_nothing() -> None:
    model = stack(Plain, nn.LayerNorm)
    fc1, bias1, *_ = packed(model, norm="last")
    assert torch.equal(fc1, torch.cat([layer.ffn.fc1.weight for layer in model.layers]))
    assert torch.equal(bias1, torch.cat([layer.ffn.fc1.bias for layer in model.layers]))


def test_missing_biases_are_zeros_where_another_member_has_one() -> None:
    model = Stack([Block(Rms(8), Plain(width=4, bias=bias)) for bias in (False, True)])
    randomise(model)
    _, bias1, _ = packed(model)  # the one bias of the down projections is read where it is
    assert torch.equal(bias1[:4], torch.zeros(4, dtype=torch.float64))
    same(bias1[4:], model.layers[1].ffn.fc1.bias)


def test_half_precision_is_rounded_once() -> None:
    """Products in float32, one rounding at the end; rounding each factor would differ."""
    model = stack(Gated, dtype=torch.bfloat16)
    gate, *_ = packed(model)
    wanted = torch.cat([layer.ffn.gate.weight.float() * layer.norm.weight.float() for layer in model.layers])
    assert gate.dtype == torch.bfloat16 and torch.equal(gate, wanted.bfloat16())


def test_without_a_bias_no_bias_is_made() -> None:
    assert len(packed(stack(Gated))) == 3
    assert len(packed(stack(Plain, bias=False))) == 2


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
