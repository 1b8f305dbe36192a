"""Created nodes carry a value, an origin and a maker; dead code goes only where it has no effect."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfusion.compiler.capture import CapturedGraph
from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor, erase_dead_code
from fxfusion.graph.effects import KEPT
from tests.helpers import capture, stack, tokens


def graph() -> CapturedGraph:
    return capture(stack(count=1), tokens(), how="symbolic")


def node_of(captured: CapturedGraph, name: str) -> fx.Node:
    return next(node for node in captured.module.graph.nodes if ops.op_name(node) == name)


def test_calls_have_values_and_provenance() -> None:
    captured = graph()
    anchor = node_of(captured, "silu")
    editor = GraphEditor(anchor, "my_pass", ["layers.0.ffn"])
    made = editor.call(operator.mul, anchor.args[0], 2.0)
    assert made.next is anchor
    value = ops.tensor_value(made)
    assert value is not None and value.shape == (2, 5, 12) and value.dtype == torch.float64
    assert made.meta["fxfusion"] == {"pass": "my_pass", "from": ["layers.0.ffn"]}
    assert editor.method("view", made, 10, 12).meta["example_value"].shape == (10, 12)
    assert editor.channels(made, 3, 7).meta["example_value"].shape == (2, 5, 4)


def test_clones_read_the_replacements() -> None:
    captured = graph()
    silu, mul = node_of(captured, "silu"), node_of(captured, "silu").next.next
    editor = GraphEditor(mul, "my_pass", ())
    double = editor.call(operator.mul, silu.args[0], 2.0)
    stand_in = editor.clone((silu,), {silu.args[0]: double})
    assert stand_in[silu].args[0] is double and silu.args[0] is not double
    assert stand_in[silu].meta is not silu.meta
    captured.module.graph.lint()


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: x.mul_(2), "mul"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout"),
        (lambda x: torch.rand_like(x), "rand_like"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: x.copy_(x + 1), "copy"),
    ],
)
def test_effects_stay_without_a_reader(function: Callable[[Tensor], Tensor], kept: str) -> None:
    captured = _unread(function)
    erase_dead_code(captured.module.graph)
    assert node_of(captured, kept)
    assert not [node for node in captured.module.graph.nodes if ops.op_name(node) == "sin"]


def test_what_nobody_read_at_capture_stays() -> None:
    captured = capture(nn.Sequential(nn.ReLU()), tokens(), how="symbolic")
    graph = captured.module.graph
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.sin, (next(iter(graph.nodes)),))
    again = CapturedGraph(module=captured.module, inputs=captured.inputs).copy()
    assert erase_dead_code(again.module.graph) == 0
    assert erase_dead_code(graph) == 1


def test_the_rest_goes_and_a_second_run_finds_nothing() -> None:
    captured = _unread(lambda x: F.dropout(x.cos(), 0.5, training=False).view(-1))
    before = len(captured.module.graph.nodes)
    erased = erase_dead_code(captured.module.graph)
    assert erased == before - len(captured.module.graph.nodes) >= 4
    assert erase_dead_code(captured.module.graph) == 0
    assert [node.op for node in captured.module.graph.nodes] == ["placeholder", "call_function", "output"]


def _unread(function: Callable[[Tensor], Tensor]) -> CapturedGraph:
    class Of(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            function(x)
            x.sin()
            return x + 1

    captured = capture(Of(), tokens(), how="symbolic")
    for node in captured.module.graph.nodes:
        node.meta.pop(KEPT, None)  # as if a pass had left it unread
    return captured
