"""Which constants of a norm are proved to be gains and shifts, and which formulas must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.passes.prove_norm import NormProver
from tests.helpers import Block, Float32Rms, Plain, Stack, customs, match, tokens

Norm = Callable[[Any, Tensor], Tensor]


def roles(norm: Norm, x: Tensor | None = None) -> list[str]:
    model = customs(lambda m, x: F.linear(F.silu(F.linear(norm(m, x), m.w1)), m.w2))
    ffn = match(model, tokens() if x is None else x, how="symbolic").ffns[0]
    return list(NormProver().roles(ffn))


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (lambda m, x: F.rms_norm(x, (8,), m.g), ["gain"]),
        (lambda m, x: F.layer_norm(x, (8,), m.g, m.b), ["gain", "shift"]),
        (lambda m, x: F.layer_norm(x, (8,), None, m.b), ["shift"]),
        (lambda m, x: F.layer_norm(x, (8,)), []),
        (lambda m, x: F.rms_norm(x, (8,)) * (1 + m.g), ["gain"]),
        (lambda m, x: F.rms_norm(x, (8,)) * m.g.abs() * m.one, ["gain", "gain"]),
        (lambda m, x: torch.addcmul(m.b, F.rms_norm(x, (8,)), m.g), ["shift", "gain"]),
        (lambda m, x: (F.rms_norm(x, (8,)) * m.g).view(-1, 8).view(2, 5, 8) * 0.5 + m.b, ["gain", "shift"]),
        (lambda m, x: x.clamp(-3, 3) * m.g, ["gain"]),
    ],
)
def test_gains_and_shifts_are_proved(norm: Norm, expected: list[str]) -> None:
    assert roles(norm) == expected


@pytest.mark.parametrize(
    "norm",
    [
        lambda m, x: F.rms_norm(x * m.g, (8,)),
        lambda m, x: F.rms_norm(x, (8,)) / m.g,
        lambda m, x: F.rms_norm(x, (8,)) ** m.g,
        lambda m, x: (F.rms_norm(x, (8,)) * m.g).clamp(-1e4, 1e4),
        lambda m, x: (F.rms_norm(x, (8,)) * m.g).tanh(),
        lambda m, x: F.relu(F.rms_norm(x, (8,)) * m.g),
        lambda m, x: F.hardtanh(F.rms_norm(x, (8,)) + m.b, -1e5, 1e5),
        lambda m, x: torch.where(m.g > 0, x, -x),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.one.abs()),
        lambda m, x: F.rms_norm(x, (8,)) - m.b,
        lambda m, x: (F.rms_norm(x, (8,)) * m.g).to(torch.int32).to(torch.float64),
        lambda m, x: (F.rms_norm(x, (8,)) * m.g).to(torch.float8_e4m3fn).to(torch.float64),
        lambda m, x: x * m.g * m.g,
    ],
    ids="inner divisor power clamp tanh relu hardtanh where epsilon minus integer tiny-float squared".split(),
)
def test_other_constants_are_fixed(norm: Norm) -> None:
    assert set(roles(norm)) == {"fixed"}


def test_a_threshold_far_from_the_random_numbers_does_not_fool_the_proof() -> None:
    """By numbers alone `clamp(n * g, -1e4, 1e4)` is `clamp(n, ...) * g`; with a gain of 1e6 it is not."""
    assert roles(lambda m, x: (F.rms_norm(x, (8,)) * m.g).clamp(-1e4, 1e4)) == ["fixed"]
    assert roles(lambda m, x: F.rms_norm(x, (8,)).clamp(-1e4, 1e4) * m.g) == ["gain"]


def test_a_norm_narrower_than_its_gain_has_no_gain() -> None:
    """Zeros equal zeros times a gain, in one channel or eight; the weights behind it have one column only."""
    model = customs(lambda m, x: F.linear(F.silu(F.linear((x * 0 * m.g)[..., :1], m.w1[:, :1])), m.w2))
    ffn = match(model, tokens(), how="symbolic").ffns[0]
    assert NormProver().roles(ffn) == ("fixed",)
    assert roles(lambda m, x: x * 0 * m.g) == ["gain"]


def test_in_place_steps_do_not_spoil_the_proof() -> None:
    def norm(m: Any, x: Tensor) -> Tensor:
        return x.clone().mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True))).mul_(m.g)

    assert roles(norm) in (["gain"], ["fixed"])
    assert roles(lambda m, x: (x * 1).mul_(m.g)) == ["gain"]


def test_an_answer_is_remembered_by_structure_not_by_name() -> None:
    model = customs(
        lambda m, x: F.linear(F.linear(F.rms_norm(x, (8,), m.g), m.w1), m.w2),
        lambda m, x: F.linear(F.linear(F.rms_norm(x * m.g, (8,)), m.w1), m.w2),
        lambda m, x: F.linear(F.linear(F.rms_norm(x, (8,), m.g), m.w1), m.w2),
    )
    prover = NormProver()
    found = [prover.roles(ffn) for ffn in match(model, tokens(), how="symbolic").ffns]
    assert found == [("gain",), ("fixed",), ("gain",)]
    assert len(prover._known) == 2


def test_the_proof_needs_no_weights() -> None:
    with torch.device("meta"):
        model = Stack([Block(nn.LayerNorm(8), Plain()), Block(Float32Rms(8), Plain())])
    ffns = match(model, torch.empty(2, 5, 8, device="meta")).ffns
    assert [NormProver().roles(ffn) for ffn in ffns] == [("gain", "shift"), ("gain",)]
