"""Between the last linear layer and the sum: scales and shifts fold, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.errors import RefusalCode
from tests.helpers import assert_fuses, assert_not_fused, customs, match, tokens

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
    assert [kind for kind, _ in ffn.tail] == ["mul", "add", "mul"]
    assert ffn.tail[0][1] == 0.5


NOT_FOLDABLE: dict[str, tuple[Branch, RefusalCode, str]] = {
    "a norm of the output and the stream": (
        lambda m, x: F.rms_norm(down(m, x) + x, (8,)),
        RefusalCode.OUTPUT_NORM,
        "not of its result alone",
    ),
    "a norm over parts": (
        lambda m, x: F.rms_norm(down(m, x).unflatten(-1, (2, 4)), (4,)).flatten(-2),
        RefusalCode.OUTPUT_NORM,
        "cuts or joins the channel axis",
    ),
    "a norm over tokens": (
        lambda m, x: (b := down(m, x)) - b.mean(1, keepdim=True),
        RefusalCode.TOKEN_MIXING,
        "lets tokens see each other",
    ),
    "activation": (lambda m, x: down(m, x).tanh(), RefusalCode.STRUCTURE, "tanh stands between"),
    "clamp": (lambda m, x: down(m, x).clamp(-1, 1), RefusalCode.STRUCTURE, "clamp stands between"),
    "integers": (
        lambda m, x: down(m, x).to(torch.int32).to(torch.float64),
        RefusalCode.STRUCTURE,
        "to stands between",
    ),
    "tiny floats": (
        lambda m, x: down(m, x).to(torch.float8_e4m3fn).to(torch.float64),
        RefusalCode.STRUCTURE,
        "to stands between",
    ),
    "a literal shift": (lambda m, x: down(m, x) + 1.0, RefusalCode.STRUCTURE, "add stands between"),
    "zero": (lambda m, x: down(m, x) * 0.0, RefusalCode.STRUCTURE, "mul stands between"),
    "a divisor per channel": (lambda m, x: down(m, x) / m.g, RefusalCode.STRUCTURE, "div stands between"),
    "a scale by a token's own value": (
        lambda m, x: down(m, x) * x.sigmoid(),
        RefusalCode.STRUCTURE,
        "mul stands between",
    ),
    "a scale by its own value": (
        lambda m, x: (b := down(m, x)) * b,
        RefusalCode.STRUCTURE,
        "mul stands between",
    ),
    "a scale per token": (
        lambda m, x: down(m, x) * m.a[: x.shape[1], None],
        RefusalCode.STRUCTURE,
        "mul stands between",
    ),
    "channels turned round": (lambda m, x: down(m, x).flip(-1), RefusalCode.TOKEN_MIXING, "flip"),
    "rounding": (lambda m, x: down(m, x).div(2, rounding_mode="floor"), RefusalCode.STRUCTURE, "div stands"),
    "part of a wider layer": (
        lambda m, x: F.linear(F.silu(F.linear(x, m.square)), m.w1)[..., :8],
        RefusalCode.STRUCTURE,
        "getitem stands between",
    ),
    "written in place": (lambda m, x: down(m, x).mul_(0.5), RefusalCode.STRUCTURE, "mul stands between"),
}


@pytest.mark.parametrize("case", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_other_tails_are_refused(case: tuple[Branch, RefusalCode, str]) -> None:
    branch, code, words = case
    assert_not_fused(customs(branch), [tokens()], code, words)


@pytest.mark.parametrize("case", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_other_tails_are_refused_where_all_sizes_coincide(case: tuple[Branch, RefusalCode, str]) -> None:
    branch, code, words = case
    if words.startswith("getitem"):
        return  # with equal sizes the whole layer is read
    assert_not_fused(customs(branch, width=8), [tokens(8, 8)], code, words)
