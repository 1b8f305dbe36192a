"""kinds: they are tried in order, the first that fits is taken, and what is said last is raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.errors import RefusalCode
from fxfusion.passes import kinds
from fxfusion.passes.end_folded import FoldedEnd
from fxfusion.passes.end_normed import NormedEnd
from fxfusion.passes.middle_normed import NormedMiddle
from fxfusion.passes.middle_pointwise import PointwiseMiddle
from tests.helpers import assert_not_fused, customs, match, tokens

Value = Callable[[Tensor], Tensor]


def same(h: Tensor) -> Tensor:
    return h


def norm(h: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:])


def branch(middle: Value, end: Value) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: end(F.linear(middle(F.linear(x, m.w1)), m.w2))


@pytest.mark.parametrize(("middle", "inner"), [(torch.tanh, PointwiseMiddle), (norm, NormedMiddle)])
@pytest.mark.parametrize(("end", "outer"), [(same, FoldedEnd), (norm, NormedEnd)])
def test_a_kind_is_a_middle_and_an_end(middle: Value, inner: type, end: Value, outer: type) -> None:
    ffn = match(customs(branch(middle, end)), tokens(), how="symbolic").ffns[0]
    assert type(ffn.middle_kind) is inner and type(ffn.end) is outer
    assert bool(ffn.middle_kind.no_module) == (middle is norm) and bool(ffn.end.no_module) == (end is norm)


def test_each_kind_is_listed_once() -> None:
    assert [type(kind) for kind in kinds.MIDDLES] == [PointwiseMiddle, NormedMiddle]
    assert len({*kinds.ENDS}) == len(kinds.ENDS) == 2


@pytest.mark.parametrize("stage", ["MIDDLES", "ENDS"])
def test_what_no_kind_knows_is_refused(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, stage, getattr(kinds, stage)[:1])
    code, words = {
        "MIDDLES": (RefusalCode.NOT_POINTWISE, "lets one intermediate channel see another"),
        "ENDS": (RefusalCode.STRUCTURE, "rms_norm stands between"),
    }[stage]
    model = customs(branch(norm, same) if stage == "MIDDLES" else branch(torch.tanh, norm))
    assert_not_fused(model, [tokens()], code, words)
