"""Dropping additions of zero: only where nobody can tell the sum from its operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.passes.drop_zero_branches import DropZeroBranches
from tests.helpers import CapturedGraph, Of, Stack, apply, assert_fuses, capture, customs, graph_text, run_graph, tokens


def scaled(function: Callable[[Any, Tensor], Tensor]) -> Of:
    return Of(function, scale=nn.Parameter(torch.full((8,), 2.0, dtype=torch.float64)))


ZEROS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "literal": lambda m, x: (x + 0) * 2,
    "literal first": lambda m, x: (0 + x) * 2,
    "float literal": lambda m, x: torch.add(x, 0.0) * 2,
    "subtracted": lambda m, x: (x - 0) * 2,
    "zeros_like": lambda m, x: (x + torch.zeros_like(x)) * 2,
    "zeros first": lambda m, x: (torch.zeros_like(x) + x) * 2,
    "zeros": lambda m, x: (x + torch.zeros(2, 5, 8, dtype=torch.float64)) * 2,
    "new_zeros": lambda m, x: (x + x.new_zeros(2, 5, 8)) * 2,
    "full of zeros": lambda m, x: (x + torch.full((2, 5, 8), 0.0, dtype=torch.float64)) * 2,
    "new_full of zeros": lambda m, x: (x + x.new_full((2, 5, 8), 0.0)) * 2,
    "broadcast zeros": lambda m, x: (x + torch.zeros(8, dtype=torch.float64)) * 2,
    "scaled by a literal": lambda m, x: (x + torch.zeros_like(x) * 0.22) * 2,
    "dropout, scale, view": lambda m, x: (
        (x + F.dropout(torch.zeros_like(x), 0.1, training=False).mul(0.22).view(2, 5, 8)) * 2
    ),
    "zero times a parameter": lambda m, x: (x + 0 * m.scale) * 2,
    "zeros times a parameter": lambda m, x: (x + m.scale * torch.zeros_like(x)) * 2,
    "sum of zeros": lambda m, x: (x + (torch.zeros_like(x) + 0)) * 2,
    "in place, of zero": lambda m, x: (x * 3).add_(0) * 2,
}

KEPT: dict[str, Callable[[Any, Tensor], Any]] = {
    "a real addition": lambda m, x: (x + 1) * 2,
    "a minuend of zero": lambda m, x: (0 - x) * 2,
    "another dtype": lambda m, x: (x.float() + torch.zeros(2, 5, 8, dtype=torch.float64)) * 2,
    "another shape": lambda m, x: (x[:, :1] + torch.zeros_like(x)) * 2,
    "zero times an activation": lambda m, x: (x + 0 * x) * 2,
    "zero times infinity": lambda m, x: (x + torch.zeros_like(x) * float("inf")) * 2,
    "ones": lambda m, x: (x + torch.ones_like(x)) * 2,
    "zeros that are written": lambda m, x: _written_zeros(x),
    "a sum that is written": lambda m, x: (x + 0).mul_(3) + x,
    "a sum whose operand is written": lambda m, x: _written_operand(x),
    "a sum that is returned": lambda m, x: x + 0,
    "a sum returned beside its operand": lambda m, x: _beside(x),
    "a size added to zeros": lambda m, x: (torch.zeros_like(x) + x.size(0)) * 2,
    "into the zeros": lambda m, x: torch.zeros_like(x).add_(x) * 2,
    "a scaled operand": lambda m, x: torch.add(torch.zeros_like(x), x, alpha=2) * 2,
}


def _written_zeros(x: Tensor) -> Tensor:
    zeros = torch.zeros_like(x)
    zeros[..., 0].add_(1)
    return (x + zeros) * 2


def _written_operand(x: Tensor) -> Tensor:
    fresh = x * 1
    kept = fresh + 0
    fresh.view(-1).mul_(3)
    return kept * 2 + fresh


def _beside(x: Tensor) -> tuple[Tensor, Tensor]:
    fresh = x * 2
    return fresh, fresh + 0


def drop(captured: CapturedGraph) -> tuple[CapturedGraph, int]:
    work, records = apply(captured, DropZeroBranches(captured.weights))
    return work, records[0].changed


# `symbolic_trace` computes tensors without inputs while it traces; Dynamo keeps the call.
ONLY_DYNAMO = ("zeros", "full of zeros", "broadcast zeros")


@pytest.mark.parametrize("name", ZEROS)
def test_additions_of_zero_go_and_results_keep_every_bit(name: str) -> None:
    model = scaled(ZEROS[name])
    work, changed = drop(capture(model, tokens(), how="dynamo" if name in ONLY_DYNAMO else "symbolic"))
    assert changed >= 1
    assert "add" not in graph_text(work)
    result = run_graph(work)
    assert torch.equal(result[0] if isinstance(result, (tuple, list)) else result, model(tokens()))
    assert drop(work)[1] == 0


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_other_additions_stay(function: Callable[[Any, Tensor], Any]) -> None:
    captured = capture(scaled(function), tokens(), how="symbolic")
    work, changed = drop(captured)
    assert changed == 0
    assert graph_text(work) == graph_text(captured)


def test_random_numbers_of_a_dropped_branch_are_still_drawn() -> None:
    model = Of(lambda m, x: (x + F.dropout(torch.zeros_like(x), 0.5, training=True)) * torch.rand_like(x))
    captured = capture(model, tokens(), how="symbolic")
    work, changed = drop(captured)
    assert changed == 1
    torch.manual_seed(3)
    expected = run_graph(captured)
    torch.manual_seed(3)
    assert torch.equal(run_graph(work), expected)


@pytest.mark.parametrize("name", ["literal", "zeros_like", "dropout, scale, view", "zero times a parameter"])
def test_stubbed_attention_between_feed_forwards_does_not_break_the_chain(name: str) -> None:
    stubs = {
        "literal": lambda m, x: 0,
        "zeros_like": lambda m, x: torch.zeros_like(x),
        "dropout, scale, view": lambda m, x: F.dropout(torch.zeros_like(x), 0.1, training=False) * 0.22,
        "zero times a parameter": lambda m, x: 0 * m.s,
    }

    class Layer(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x + stubs[name](self.block, x))

    blocks = customs(lambda m, x: F.linear(F.silu(F.linear(x * m.g, m.w1)), m.w2), count=3).layers
    assert_fuses(Stack(Layer(block) for block in blocks), tokens())


def test_golden(golden: Callable[[str, str], None]) -> None:
    captured = capture(scaled(ZEROS["dropout, scale, view"]), tokens(), how="symbolic")
    golden("drop_zero_branches.before", graph_text(captured))
    golden("drop_zero_branches.after", graph_text(drop(captured)[0]))
