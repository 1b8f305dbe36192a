"""end_normed: a norm behind the last linear layer, in any spelling, and what is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxfusion.errors import RefusalCode
from fxfusion.graph import ops
from fxfusion.passes import choose_form
from fxfusion.passes.end_folded import FoldedEnd
from fxfusion.passes.end_normed import NormedEnd
from fxfusion.passes.middle_pointwise import PointwiseMiddle
from tests.helpers import assert_fuses, assert_not_fused, customs, match, refused, tokens
from tests.passes.test_choose_form import grouped_of
from tests.passes.test_end_folded import Branch, down

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
    assert isinstance(ffn.end, NormedEnd) and isinstance(ffn.middle_kind, PointwiseMiddle)
    assert [ops.op_name(node) for node in ffn.end.nodes] == ["mul", "rms_norm", "mul", "add"]
    assert ffn.end.nodes[-1] is ffn.branch and ffn.end.steps == ()


def test_scales_alone_are_no_norm() -> None:
    ffn = match(customs(lambda m, x: down(m, x) * m.g + m.s), tokens(), how="symbolic").ffns[0]
    assert isinstance(ffn.end, FoldedEnd) and len(ffn.end.steps) == 2


REFUSED = refused(
    OUTPUT_NORM={
        "with the stream": (lambda m, x: F.rms_norm(down(m, x) + x, (8,)), "not of its result"),
        "gated by the stream": (lambda m, x: F.rms_norm(down(m, x), (8,)) * x.sigmoid(), "not of its result"),
        "of parts": (
            lambda m, x: F.rms_norm(down(m, x).unflatten(-1, (2, 4)), (4,)).flatten(-2),
            "cuts or joins the channel axis",
        ),
        "tokens in other groups": (
            lambda m, x: F.rms_norm(down(m, x).unsqueeze(0), (8,)).view(x.shape),
            "groups the tokens in another way",
        ),
    },
    TOKEN_MIXING={
        "over tokens": (lambda m, x: (b := down(m, x)) - b.mean(1, keepdim=True), "lets tokens see each other")
    },
    RANDOM={"random": (lambda m, x: F.dropout(F.rms_norm(down(m, x), (8,)), 0.5), "random")},
)


@pytest.mark.parametrize(("branch", "code", "words"), REFUSED)
def test_what_is_no_norm_of_the_output_alone_is_refused(branch: Branch, code: RefusalCode, words: str) -> None:
    assert_not_fused(customs(branch), [tokens()], code, words)
    if not words.startswith("groups"):  # batch = sequence = hidden = width: no shape can tell the axes apart
        assert_not_fused(customs(branch, width=8), [tokens(8, 8)], code, words)


def test_which_downs_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = (replace(grouped_of(dtype), form="prepacked") for dtype in (torch.bfloat16, torch.float32))
    end = half.end
    assert end.packs_down(half) and not end.packs_down(single)
    assert not end.packs_down(grouped_of(torch.bfloat16)) and not end.packs_down(replace(half, form="members"))
    monkeypatch.setattr(choose_form, "CACHE", 0)
    assert end.packs_down(single)
