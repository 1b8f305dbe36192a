"""Facts of a graph: constants, writes through aliases, slices, what escapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxfusion.graph.dataflow import GraphFacts
from tests.blocks import Of


def facts(body: Callable[[Any, Tensor], Any]) -> tuple[GraphFacts, dict[str, fx.Node]]:
    graph = fx.Tracer().trace(Of(body, w=nn.Parameter(torch.ones(4, 4)), v=nn.Parameter(torch.ones(4))))
    return GraphFacts(graph, ()), {node.name: node for node in graph.nodes}


def test_constants_are_what_weights_alone_decide() -> None:
    found, nodes = facts(lambda m, x: x @ (1 + m.w.t()) + m.v * x.mean())
    assert {node.name for node in found.constants} == {"w", "t", "add", "v"}
    assert nodes["x"] not in found.constants and nodes["mean"] not in found.constants


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.w.mul_(2),
        lambda m: m.w.view(-1).mul_(2),
        lambda m: m.w[0].zero_(),
        lambda m: m.w.T.copy_(m.w),
        lambda m: torch.nn.functional.relu(m.w, inplace=True),
    ],
    ids="itself view row attribute keyword".split(),
)
def test_a_written_weight_and_what_is_made_of_it_are_no_constants(write: Callable[[Any], Any]) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        write(m)
        return x @ (m.w + 1) + m.v

    found, nodes = facts(body)
    assert nodes["w"] in found.written
    assert {node.name for node in found.constants} == {"v"}


def test_a_written_copy_of_a_weight_is_no_constant_but_the_weight_is() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        copy = m.w * 1.0
        copy.view(-1).add_(1)
        return x @ copy

    found, nodes = facts(body)
    assert nodes["w"] in found.constants and nodes["mul"] not in found.constants
    assert found.written == {nodes["mul"]}


def test_alias_root_goes_through_views_and_writes_but_not_through_sums() -> None:
    found, nodes = facts(lambda m, x: (x + 1).view(16)[2:].add_(3).unsqueeze(0) * 2)
    assert found.effects.root(nodes["unsqueeze"]) is nodes["add"]
    assert found.effects.root(nodes["mul"]) is nodes["mul"]


def test_writes_of_a_value_and_of_its_views() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y, other = x * 2, x * 3
        y[0].copy_(other[1])
        other.add_(1)
        return y.view(-1).mul_(2).sum() + other.sum() + y.neg()

    found, nodes = facts(body)
    assert [node.name for node in found.effects.writers_of(nodes["mul"])] == ["copy_", "mul_"]
    assert [node.name for node in found.effects.writers_of(nodes["mul_1"])] == ["add_"]
    assert found.effects.writers_of(nodes["x"]) == ()


def test_slices() -> None:
    found, nodes = facts(lambda m, x: (y := x * 2) + (y * m.v + x).sin() * y.size(0))
    cut = found.slice_between(nodes["mul_2"], nodes["mul"])
    assert [node.name for node in cut.nodes] == ["mul_1", "add", "sin", "mul_2"]
    assert [node.name for node in cut.shapes] == ["size"], "known with the value"
    assert cut.reaches_stop
    assert [node.name for node in cut.leaks] == ["x"] and [node.name for node in cut.constants] == ["v"]
    away = found.slice_between(nodes["mul"], nodes["x"])
    assert away.reaches_stop and [node.name for node in away.nodes] == ["mul"]


def test_a_slice_that_never_meets_its_stop_says_so() -> None:
    found, nodes = facts(lambda m, x: (x * 2, x * 3))
    assert not found.slice_between(nodes["mul_1"], nodes["mul"]).reaches_stop


def test_readers_of_values_are_not_those_of_shapes() -> None:
    found, nodes = facts(lambda m, x: (y := x * 2).view(y.size(0), -1) + 1)
    assert {node.name for node in found.readers(nodes["mul"])} == {"view"}


def test_modes_count_switches() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_function(torch.sin, (x,))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    two = graph.call_function(torch.cos, (one,))
    graph.output(two)
    found = GraphFacts(graph, ())
    assert found.mode[one] + 1 == found.mode[two]
