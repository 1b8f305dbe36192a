"""match_output: a norm behind the last linear layer, in any spelling, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.errors import RefusalCode
from fxfusion.graph import ops
from tests.helpers import assert_fuses, assert_not_fused, customs, match, tokens

Branch = Callable[[Any, Tensor], Tensor]


def down(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, m.w1)), m.w2, m.b2)


NORMS: dict[str, Branch] = {
    "rms": lambda m, x: F.rms_norm(down(m, x), (8,), m.g),
    "rms by hand": lambda m, x: m.g * (b := down(m, x)) * torch.rsqrt(b.pow(2).mean(-1, keepdim=True) + 1e-6),
    "cast as the stream": lambda m, x: F.rms_norm(down(m, x), (8,), m.g).to(x),
    "layer norm": lambda m, x: F.layer_norm(down(m, x), (8,), m.g, m.s),
    "length": lambda m, x: F.normalize(down(m, x), dim=-1) * m.g,
    "range": lambda m, x: (b := down(m, x)) / (b.amax(-1, keepdim=True) - b.amin(-1, keepdim=True)) + m.s,
    "softmax": lambda m, x: down(m, x).softmax(-1) * m.one,
    "scaled before and after": lambda m, x: F.rms_norm(down(m, x) * m.g, (8,)) * 0.3 + m.s,
    "an activation behind it": lambda m, x: torch.tanh(F.rms_norm(down(m, x), (8,), m.g)),
    "tokens in one axis": lambda m, x: F.rms_norm(down(m, x.view(-1, 8)), (8,), m.g).view(x.shape),
    "tokens in one axis for the norm": lambda m, x: F.rms_norm(down(m, x).view(-1, 8), (8,), m.g).view(x.shape),
    "axes counted from the front": lambda m, x: (b := down(m, x)) - b.mean(2, keepdim=True) * m.g,
    "divided by its own size": lambda m, x: (b := down(m, x)) * (b.square().sum(-1, keepdim=True) / b.size(-1)).rsqrt(),
    "written in place": lambda m, x: F.layer_norm(down(m, x), (8,)).mul_(m.g),
}


@pytest.mark.parametrize("branch", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("how", ["symbolic", "dynamo"])
def test_norms_on_the_output_are_grouped(branch: Branch, how: Any) -> None:
    report = assert_fuses(customs(branch), tokens(), how=how)
    assert [group.form for group in report.groups] == ["grouped"]


def test_the_region_goes_from_the_last_linear_layer_to_the_branch() -> None:
    ffn = match(customs(NORMS["scaled before and after"]), tokens(), how="symbolic").ffns[0]
    assert [ops.op_name(node) for node in ffn.output] == ["mul", "rms_norm", "mul", "add"]
    assert ffn.output[-1] is ffn.branch and ffn.tail == () and not ffn.segmented


def test_scales_alone_are_no_norm() -> None:
    ffn = match(customs(lambda m, x: down(m, x) * m.g + m.s), tokens(), how="symbolic").ffns[0]
    assert ffn.output == () and len(ffn.tail) == 2


REFUSED: dict[str, tuple[Branch, RefusalCode, str]] = {
    "with the stream": (lambda m, x: F.rms_norm(down(m, x) + x, (8,)), RefusalCode.OUTPUT_NORM, "not of its result"),
    "gated by the stream": (
        lambda m, x: F.rms_norm(down(m, x), (8,)) * x.sigmoid(),
        RefusalCode.OUTPUT_NORM,
        "not of its result",
    ),
    "of parts": (
        lambda m, x: F.rms_norm(down(m, x).unflatten(-1, (2, 4)), (4,)).flatten(-2),
        RefusalCode.OUTPUT_NORM,
        "cuts or joins the channel axis",
    ),
    "over tokens": (
        lambda m, x: (b := down(m, x)) - b.mean(1, keepdim=True),
        RefusalCode.TOKEN_MIXING,
        "lets tokens see each other",
    ),
    "tokens in other groups": (
        lambda m, x: F.rms_norm(down(m, x).unsqueeze(0), (8,)).view(x.shape),
        RefusalCode.OUTPUT_NORM,
        "groups the tokens in another way",
    ),
    "none": (lambda m, x: torch.tanh(down(m, x)), RefusalCode.STRUCTURE, "tanh stands between"),
    "random": (lambda m, x: F.dropout(F.rms_norm(down(m, x), (8,)), 0.5), RefusalCode.RANDOM, "random"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_no_norm_of_the_output_alone_is_refused(case: tuple[Branch, RefusalCode, str]) -> None:
    branch, code, words = case
    assert_not_fused(customs(branch), [tokens()], code, words)
