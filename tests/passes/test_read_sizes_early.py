"""Sizes, dtypes and devices are read from the earliest value that has them; what may be resized is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxfusion.compiler.capture import captured_from_graph
from fxfusion.graph import ops
from fxfusion.passes.read_sizes_early import ReadSizesEarly
from tests.helpers import HIDDEN, CapturedGraph, apply, graph_text, nodes_named, run_graph, tokens
from tests.passes.test_drop_no_ops import Of


def flat(x: Tensor) -> Tensor:
    y = x + x.tanh()
    rows = y.view(y.size(0) * y.size(1), y.shape[-1])
    return (y + rows.sin().view_as(y)).type_as(y)


def swapped(x: Tensor) -> Tensor:
    y = x.view(x.size(1), x.size(0), -1)
    return y.tanh().view(y.size(0), y.size(1), -1)


def resized(x: Tensor) -> Tensor:
    y = x.clone()
    before = y.size(0)
    y.resize_(1, 2)
    return y.view(y.size(0), -1) * before


def capture(body: Callable[[Tensor], Tensor], dynamic: bool) -> CapturedGraph:
    x = tokens()
    if not dynamic:
        return captured_from_graph(fx.symbolic_trace(Of(body)), (x,))
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}}
    return captured_from_graph(torch.export.export(Of(body), (x,), dynamic_shapes=sizes).module(), (x,))


def early(captured: CapturedGraph) -> tuple[CapturedGraph, int]:
    work, records = apply(captured, ReadSizesEarly())
    return work, records[0].changed


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_of_a_sum_are_those_of_the_input(dynamic: bool) -> None:
    captured = capture(flat, dynamic)
    work, changed = early(captured)
    assert changed
    x = next(node for node in work.module.graph.nodes if node.op == "placeholder")
    asked = [node for node in work.module.graph.nodes if ops.is_shape_value(node) and node.op.startswith("call_f")]
    reads = {source for node in asked for source in node.all_input_nodes if ops.tensor_value(source) is not None}
    assert reads == {x} and not nodes_named(work, "view_as") and not nodes_named(work, "type_as")
    other = torch.randn(4, 2, x.meta.get("example_value", x.meta.get("val")).shape[-1], dtype=torch.float64)
    assert torch.equal(work.module(other)[0], captured.module(other)[0])
    assert early(work)[1] == 0, "not idempotent"


def test_a_number_is_computed_once() -> None:
    def twice(x: Tensor) -> Tensor:
        y = x.tanh()
        return x.view(x.size(0) * x.size(1), -1).view(y.size(0) * y.size(1), -1)

    work, _ = early(capture(twice, dynamic=True))
    assert len(nodes_named(work, "mul")) == 1


def test_sizes_in_other_places_are_not_taken_for_those_of_the_input() -> None:
    """Both sizes are 4 in the example, and swapped."""
    captured = captured_from_graph(fx.symbolic_trace(Of(swapped)), (torch.randn(4, 4, 8),))
    work, _ = early(captured)
    other = torch.randn(2, 3, 8)
    assert work.module(other).shape == swapped(other).shape == (3, 2, 8)


def test_what_may_be_resized_is_left_alone() -> None:
    captured = capture(resized, dynamic=False)
    work, changed = early(captured)
    assert changed == 0 and graph_text(work) == graph_text(captured)
    assert torch.equal(run_graph(work), run_graph(captured))


def test_a_cast_that_may_move_is_left_alone() -> None:
    captured = capture(lambda x: x.tanh().to(x), dynamic=False)
    for node in nodes_named(captured, "tanh"):
        node.meta["example_value"] = node.meta["example_value"].to("meta")
    assert early(captured)[1] == 0 and nodes_named(early(captured)[0], "to")[0].args[1].op == "placeholder"


def test_a_number_that_is_returned_stays_a_result() -> None:
    captured = capture(lambda x: (x.tanh(), x.size(0), x.size(2)), dynamic=True)
    x = torch.randn(4, 3, HIDDEN, dtype=torch.float64)
    assert early(captured)[0].module(x)[1:] == captured.module(x)[1:] == (4, HIDDEN)


def test_no_size_is_no_change() -> None:
    captured = capture(lambda x: x + x.tanh(), dynamic=False)
    work, changed = early(captured)
    assert changed == 0 and graph_text(work) == graph_text(captured)


def test_golden(golden: Callable[[str, str], None]) -> None:
    captured = capture(flat, dynamic=False)
    golden("read_sizes_early.before", graph_text(captured))
    golden("read_sizes_early.after", graph_text(early(captured)[0]))
