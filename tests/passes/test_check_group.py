"""check_group: which FFNs of one chain may become one, and the code of each refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.errors import RefusalCode
from tests.helpers import (
    Block,
    Gated,
    Plain,
    Rms,
    Stack,
    assert_exact,
    assert_fuses,
    assert_not_fused,
    fuse,
    parallel_form,
    randomise,
    tokens,
)


def pair(*blocks: nn.Module) -> Stack:
    model = Stack(blocks)
    randomise(model)
    return model


def refused(model: nn.Module, code: RefusalCode, fragment: str = "") -> None:
    """No group at all, with this reason, and the very result of the model."""
    assert_not_fused(model, [tokens()], code, fragment)


class Rounded(Gated):
    """Computes its middle in float32."""

    def forward(self, n: Tensor) -> Tensor:
        return self.down((F.silu(self.gate(n).float()) * self.up(n).float()).double())


MISFITS: dict[str, tuple[Callable[[], nn.Module], RefusalCode, str]] = {
    "activation": (lambda: Block(Rms(8), Gated(act=F.gelu)), RefusalCode.DIFFERENT_OPS, "silu"),
    "kind of FFN": (lambda: Block(Rms(8), Plain()), RefusalCode.DIFFERENT_OPS, ""),
    "eps": (lambda: Block(Rms(8, eps=1e-5), Gated()), RefusalCode.DIFFERENT_LITERAL, "1e-05"),
    "norm": (lambda: Block(nn.LayerNorm(8), Gated()), RefusalCode.DIFFERENT_OPS, "layer_norm"),
    "dtype inside": (lambda: Block(Rms(8), Rounded()), RefusalCode.DIFFERENT_OPS, ""),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_another_one_does_not_mix(misfit: tuple[Callable[[], nn.Module], RefusalCode, str]) -> None:
    other, code, words = misfit
    refused(pair(Block(Rms(8), Gated()), other()), code, words)


class GainInside(nn.Module):
    """A norm whose constant is no gain: it acts before the statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_constant_that_is_no_gain_is_unproved() -> None:
    model = pair(*(Block(GainInside(), Gated()) for _ in range(2)))
    refused(model, RefusalCode.NORM_UNPROVED, "not proved")


def test_norm_last_needs_no_proof() -> None:
    model, x = pair(*(Block(GainInside(), Gated()) for _ in range(2))), tokens()
    fused, report = fuse(model, x, policy={"norm": "last"})
    assert len(report.groups) == 1
    assert_exact(fused(x), parallel_form(model, x, norm="last"), torch.float64)


def test_a_shared_norm_is_kept_as_it_is() -> None:
    norm = GainInside()
    assert_fuses(pair(*(Block(norm, Gated()) for _ in range(2))), tokens())


def test_a_misfit_in_the_middle_leaves_the_groups_on_both_sides() -> None:
    blocks = [Block(Rms(8), Gated(act=F.gelu if index == 2 else F.silu)) for index in range(5)]
    model, x = pair(*blocks), tokens()
    fused, report = fuse(model, x)
    assert [len(group.members) for group in report.groups] == [2, 2]
    assert_exact(fused(x), parallel_form(model, x, [[0, 1], [3, 4]]), torch.float64)
