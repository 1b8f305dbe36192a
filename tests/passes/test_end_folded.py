"""end_folded: between the last linear layer and the sum scales and shifts fold, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.errors import RefusalCode
from tests.helpers import Block, Rms, Stack, assert_fuses, assert_not_fused, customs, match, randomise, refused, tokens
from tests.passes.test_build_wide import packed, same
from tests.passes.test_concatenate import Tail

Branch = Callable[[Any, Tensor], Tensor]


def down(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, m.w1)), m.w2, m.b2)


TAILS: dict[str, Branch] = {
    "nothing": lambda m, x: down(m, x),
    "a multiplier": lambda m, x: down(m, x) * 0.22,
    "a multiplier first": lambda m, x: 0.22 * down(m, x),
    "a divisor": lambda m, x: down(m, x) / 3,
    "a learned number": lambda m, x: down(m, x) * m.one,
    "a scale per channel": lambda m, x: m.g * down(m, x),
    "a scale per channel with axes": lambda m, x: down(m, x) * m.g.view(1, 1, 8),
    "a computed scale": lambda m, x: down(m, x) * (1 + m.g.exp()),
    "a shift per channel": lambda m, x: down(m, x) + m.s,
    "a shift first": lambda m, x: m.s + down(m, x),
    "scale, shift, scale": lambda m, x: (down(m, x) * m.g + m.s) * 0.5,
    "shift, then scale": lambda m, x: (down(m, x) + m.s) * m.g,
    "a view": lambda m, x: down(m, x.view(10, 8)).view(2, 5, 8),
    "a view and a scale": lambda m, x: (down(m, x.view(10, 8)) * m.g).view(2, 5, 8) * 0.5,
}


@pytest.mark.parametrize("branch", TAILS.values(), ids=TAILS)
def test_tails_fold(branch: Branch) -> None:
    assert_fuses(customs(branch), tokens())


def test_members_may_have_different_tails() -> None:
    model = customs(
        lambda m, x: down(m, x) * 0.22,
        lambda m, x: down(m, x) * 0.5,
        lambda m, x: down(m, x) * m.g + m.s,
        lambda m, x: down(m, x),
    )
    assert_fuses(model, tokens())


def test_the_steps_are_recorded_in_order() -> None:
    ffn = match(customs(lambda m, x: (down(m, x) * 0.5 + m.s) * m.g), tokens(), how="symbolic").ffns[0]
    assert [kind for kind, _ in ffn.end.steps] == ["mul", "add", "mul"]
    assert ffn.end.steps[0][1] == 0.5


NOT_FOLDABLE = refused(
    TOKEN_MIXING={"channels turned round": (lambda m, x: down(m, x).flip(-1), "flip")},
    STRUCTURE={
        "activation": (lambda m, x: down(m, x).tanh(), "tanh stands between"),
        "clamp": (lambda m, x: down(m, x).clamp(-1, 1), "clamp stands between"),
        "integers": (lambda m, x: down(m, x).to(torch.int32).to(torch.float64), "to stands between"),
        "tiny floats": (lambda m, x: down(m, x).to(torch.float8_e4m3fn).to(torch.float64), "to stands between"),
        "a literal shift": (lambda m, x: down(m, x) + 1.0, "add stands between"),
        "zero": (lambda m, x: down(m, x) * 0.0, "mul stands between"),
        "a divisor per channel": (lambda m, x: down(m, x) / m.g, "div stands between"),
        "a scale by a token's own value": (lambda m, x: down(m, x) * x.sigmoid(), "mul stands between"),
        "a scale by its own value": (lambda m, x: (b := down(m, x)) * b, "mul stands between"),
        "a scale per token": (lambda m, x: down(m, x) * m.a[: x.shape[1], None], "mul stands between"),
        "rounding": (lambda m, x: down(m, x).div(2, rounding_mode="floor"), "div stands"),
        "part of a wider layer": (
            lambda m, x: F.linear(F.silu(F.linear(x, m.square)), m.w1)[..., :8],
            "getitem stands between",
        ),
        "written in place": (lambda m, x: down(m, x).mul_(0.5), "mul stands between"),
    },
)


@pytest.mark.parametrize(("branch", "code", "words"), NOT_FOLDABLE)
def test_other_tails_are_refused(branch: Branch, code: RefusalCode, words: str) -> None:
    """Also where batch = sequence = hidden = width: no shape can tell the axes apart."""
    assert_not_fused(customs(branch), [tokens()], code, words)
    if not words.startswith("getitem"):  # with equal sizes the whole layer is read
        assert_not_fused(customs(branch, width=8), [tokens(8, 8)], code, words)


def test_tails_are_folded_into_the_down_projection() -> None:
    model = Stack([Block(Rms(8), Tail(factor, True)) for factor in (0.5, 2.0)])
    randomise(model)
    *_, down, bias = packed(model)
    parts = [layer.ffn for layer in model.layers]
    same(down, torch.cat([ffn.down.weight * ffn.scale[:, None] * ffn.factor for ffn in parts], 1))
    same(bias, sum((ffn.down.bias * ffn.scale + ffn.shift) * ffn.factor for ffn in parts))
