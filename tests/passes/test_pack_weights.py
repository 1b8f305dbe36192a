"""pack_weights: the packed tensors themselves, against values computed by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxfusion.compiler.pipeline import fuse_captured
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import Block, Gated, Plain, Rms, Stack, capture, randomise, stack, tokens
from tests.passes.test_concatenate import Tail


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


def test_tails_are_folded_into_the_down_projection() -> None:
    model = Stack([Block(Rms(8), Tail(factor, True)) for factor in (0.5, 2.0)])
    randomise(model)
    *_, down, bias = packed(model)
    parts = [layer.ffn for layer in model.layers]
    same(down, torch.cat([ffn.down.weight * ffn.scale[:, None] * ffn.factor for ffn in parts], 1))
    same(bias, sum((ffn.down.bias * ffn.scale + ffn.shift) * ffn.factor for ffn in parts))


def test_half_precision_is_rounded_once() -> None:
    """Products in float32, one rounding at the end; rounding each factor would differ."""
    model = stack(Gated, dtype=torch.bfloat16)
    gate, *_ = packed(model)
    wanted = torch.cat([layer.ffn.gate.weight.float() * layer.norm.weight.float() for layer in model.layers])
    assert gate.dtype == torch.bfloat16 and torch.equal(gate, wanted.bfloat16())


def test_without_a_bias_no_bias_is_made() -> None:
    assert len(packed(stack(Gated))) == 3
    assert len(packed(stack(Plain, bias=False))) == 2
