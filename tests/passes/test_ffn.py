"""The records between matchers and rewriters: what they say of a matched feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, fx

from fxfusion.graph import ops
from fxfusion.passes.ffn import Group, Piece
from tests.helpers import Plain, match, stack, tokens
from tests.helpers import customs as hand_written


def test_a_gated_feed_forward_is_recorded_whole() -> None:
    ffn = match(stack(count=2), tokens()).ffns[0]
    assert (ffn.hidden, ffn.width) == (8, 12)
    assert [linear.out_features for linear in ffn.projections] == [12, 12]
    assert [ops.op_name(node) for node in ffn.middle] == ["silu", "mul"]
    assert ops.op_name(ffn.prologue[-1]) == "mul" and ffn.normed is ffn.prologue[-1]
    assert len(ffn.prologue_constants) == 1 and not ffn.middle_constants and not ffn.end.steps
    assert ffn.branch is ffn.down.node
    assert len(set(ffn.weights)) == 3
    assert set(ffn.prologue) | set(ffn.middle) <= set(ffn.nodes)
    assert (ffn.name, ffn.layer) == ("layers.0.ffn", "layers.0")
    assert ffn.source.startswith("blocks.py:")


def test_biases_and_absent_biases() -> None:
    with_bias = match(stack(Plain, count=1), tokens()).ffns[0]
    without = match(stack(Plain, count=1, bias=False), tokens()).ffns[0]
    assert with_bias.down.bias is not None and without.down.bias is None


def test_equal_feed_forwards_have_equal_structures_and_others_do_not() -> None:
    def branch(scale: float) -> Any:
        def run(m: Any, x: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(x * m.g, m.w1) * scale), m.w2)

        return run

    one, same, other = match(hand_written(branch(1.5), branch(1.5), branch(2.5)), tokens(), how="symbolic").ffns
    assert one.structure == same.structure != other.structure
    assert one.prologue_structure == other.prologue_structure


@pytest.mark.parametrize(
    ("start", "stop", "step", "width"), [(0, 12, 1, 12), (12, 24, 1, 12), (0, 24, 2, 12), (1, 24, 2, 12), (0, 5, 2, 3)]
)
def test_piece_width(start: int, stop: int, step: int, width: int) -> None:
    assert Piece(node=fx.Graph().placeholder("h"), projection=0, start=start, stop=stop, step=step).width == width


def test_group_width_is_the_sum_and_records_cannot_be_changed() -> None:
    ffns = match(stack(count=2, widths=[12, 4]), tokens()).ffns
    group = Group(members=tuple(ffns), norm="fold")
    assert group.width == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.norm = "last"  # type: ignore[misc]
