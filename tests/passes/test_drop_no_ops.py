"""Dropping what returns its input: exact to the bit, aliases included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.compiler.capture import captured_from_graph
from fxfusion.passes.drop_no_ops import DropNoOps
from tests.helpers import apply, capture, graph_text, nodes_named, run_graph, tokens


class Of(nn.Module):
    """A module from a function, so that it can be traced."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast to its own dtype": lambda x: x.to(torch.float64) * 2,
    "double": lambda x: x.double() * 2,
    "type_as": lambda x: (x * 3).type_as(x) * 2,
    "eval dropout": lambda x: F.dropout(x, 0.5, training=False) * 2,
    "eval dropout in place": lambda x: F.dropout(x * 1, 0.5, training=False, inplace=True) * 2,
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True) * 2,
    "there and back": lambda x: x.view(-1, 8).view(2, 5, 8) * 2,
    "flatten and unflatten": lambda x: x.flatten(0, 1).unflatten(0, (2, 5)) * 2,
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1) * 2,
    "view of its own shape": lambda x: x.view(2, 5, 8) * 2,
    "contiguous": lambda x: x.contiguous() * 2,
    "a view of its own shape by another's": lambda x: x.expand(2, 5, 8) * 2,
    "three views": lambda x: x.reshape(80).reshape(-1, 8).reshape(2, 5, 8) * 2,
}

KEPT: dict[str, Callable[[Tensor], object]] = {
    "a real cast": lambda x: x.float() * 2,
    "a copy that is written": lambda x: x.to(torch.float64, copy=True).add_(1) + x,
    "a copy by position that is written": lambda x: x.to(torch.float64, False, True).add_(1) + x,
    "a copy that is returned": lambda x: x.to(torch.float64, copy=True),
    "a copy that the caller gets, behind a view": lambda x: x.to(torch.float64, copy=True).view(80),
    "training dropout": lambda x: F.dropout(x, 0.5, training=True) * 2,
    "two views, one written": lambda x: x.mul(2).view(-1).add_(1).sum() + x.view(-1).mean(),
    "two views, for two branches": lambda x: x.view(-1, 8).matmul(x[0].T.matmul(x[1])) + x.view(-1, 8),
    "two views, the second returned": lambda x: (x.view(-1, 8) * 2, x.view(-1, 8)),
    "half of a way": lambda x: x.view(-1, 8) * 2,
    "another layout": lambda x: x[None].contiguous(memory_format=torch.channels_last) * 2,
    "contiguous of a transpose": lambda x: x.transpose(0, 1).contiguous() * 2,
    "a copying reshape, written": lambda x: x.transpose(0, 1).reshape(10, 8).reshape(5, 2, 8).mul_(3) + x.mean(),
    "other bits": lambda x: x.view(torch.int64) * 2,
}


@pytest.mark.parametrize("function", NO_OPS.values(), ids=NO_OPS)
def test_no_ops_go_and_results_keep_every_bit(function: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Of(function), tokens(), how="symbolic")
    work, records = apply(captured, DropNoOps())
    assert records[0].changed > 0
    assert len([node for node in work.module.graph.nodes if node.op.startswith("call")]) <= 2
    assert torch.equal(run_graph(work), function(tokens()))
    _, again = apply(work, DropNoOps())
    assert again[0].changed == 0


def test_one_view_of_a_value_is_enough() -> None:
    captured = capture(Of(lambda x: x.view(-1, 8) * x.view(-1, 8) + x.view(80)[:8]), tokens(), how="symbolic")
    work, records = apply(captured, DropNoOps())
    assert records[0].changed == 1 and len(nodes_named(work, "view")) == 2
    assert torch.equal(run_graph(work), run_graph(captured))


def test_views_in_two_modes_are_two() -> None:
    def body(x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = x.view(-1, 8) * 2
        return constant + x.view(-1, 8)

    assert apply(capture(body, tokens()), DropNoOps())[1][0].changed == 0


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_what_makes_a_difference_stays(function: Callable[[Tensor], object]) -> None:
    captured = capture(Of(function), tokens(), how="symbolic")
    work, records = apply(captured, DropNoOps())
    assert records[0].changed == 0
    assert graph_text(work) == graph_text(captured)


def test_a_dropped_view_leaves_writes_where_they_were() -> None:
    def function(x: Tensor) -> Tensor:
        fresh = x * 1
        fresh.view(-1, 8).view(2, 5, 8).mul_(3)
        return fresh + 1

    captured = capture(Of(function), tokens(), how="symbolic")
    work, records = apply(captured, DropNoOps())
    assert records[0].changed == 1
    assert torch.equal(run_graph(work), function(tokens()))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_copy_into_another_layout_stays_where_sizes_are_symbols(dynamic: bool) -> None:
    """The view after it needs the copy. Where sizes are symbols, nothing shows a layout."""
    model = Of(lambda x: x.transpose(0, 1).contiguous().view(-1) * 2)
    symbols = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")},) if dynamic else None
    program = torch.export.export(model, (tokens(),), dynamic_shapes=symbols)
    work, _ = apply(captured_from_graph(program.module(), (tokens(),)), DropNoOps())
    assert torch.equal(run_graph(work), tokens().transpose(0, 1).reshape(-1) * 2)


def test_metadata_assertions_of_exported_graphs_go() -> None:
    captured = capture(Of(lambda x: x.to(torch.float64) * 2), tokens(), how="export")
    work, _ = apply(captured, DropNoOps())
    assert not nodes_named(work, "_assert_tensor_metadata") and not nodes_named(work, "to")


def test_golden(golden: Callable[[str, str], None]) -> None:
    def function(x: Tensor) -> Tensor:
        h = F.dropout(x.to(torch.float64), 0.1, training=False)
        return h.view(-1, 8).view(2, 5, 8) + h

    captured = capture(Of(function), tokens(), how="symbolic")
    work, _ = apply(captured, DropNoOps())
    golden("drop_no_ops.before", graph_text(captured))
    golden("drop_no_ops.after", graph_text(work))
