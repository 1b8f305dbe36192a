"""One name for each operation, whatever the capture spelled it as, and what it does beside returning a value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxfusion.graph import ops

ATEN = torch.ops.aten


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node of its own; `x` in the arguments becomes a placeholder."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    swap = lambda value: x if isinstance(value, str) and value == "x" else value  # noqa: E731
    kind = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(
        kind, target, tuple(swap(value) for value in args), {key: swap(value) for key, value in kwargs.items()}
    )


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (operator.add, "add"),
        (operator.iadd, "add"),
        (torch.add, "add"),
        ("add", "add"),
        ("add_", "add"),
        ("__iadd__", "add"),
        (ATEN.add.Tensor, "add"),
        (ATEN.add_.Tensor, "add"),
        (operator.truediv, "div"),
        (operator.itruediv, "div"),
        (torch.true_divide, "div"),
        (torch.multiply, "mul"),
        (F.silu, "silu"),
        (ATEN.silu_.default, "silu"),
        (F.linear, "linear"),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
        ("type", "to"),
        (ATEN._to_copy.default, "to"),
        (ATEN._unsafe_view.default, "view"),
        ("swapaxes", "transpose"),
        (operator.setitem, "setitem"),
        ("__setitem__", "setitem"),
        (operator.and_, "bitwise_and"),
    ],
)
def test_names(target: Any, name: str) -> None:
    assert ops.op_name(call(target, "x")) == name


def test_nodes_that_call_nothing_have_no_name() -> None:
    assert ops.op_name(fx.Graph().placeholder("add")) == ""


@pytest.mark.parametrize(
    ("node", "writes"),
    [
        (call(operator.iadd, "x", 1), True),
        (call(operator.setitem, "x", 0, 1), True),
        (call("mul_", "x", 2), True),
        (call("__imul__", "x", 2), True),
        (call(F.relu, "x", inplace=True), True),
        (call(F.relu, "x", True), True),
        (call(F.hardswish, "x", True), True),
        (call(F.threshold, "x", 0.1, 0.0, True), True),
        (call(F.dropout, "x", 0.5, True, True), True),
        (call(torch.add, "x", 1, out="x"), True),
        (call(ATEN.copy_.default, "x", "x"), True),
        (call(F.dropout, "x", 0.5, False, True), False),
        (call(F.relu, "x", False), False),
        (call(operator.add, "x", 1), False),
        (call("__invert__", "x"), False),
        (call(ATEN.add.Tensor, "x", "x"), False),
    ],
    ids=str,
)
def test_in_place_writes(node: fx.Node, writes: bool) -> None:
    assert ops.writes_in_place(node) is writes
    if writes:
        assert ops.written_argument(node) is not None
        assert not ops.is_pure(node)


@pytest.mark.parametrize(
    ("node", "random"),
    [
        (call(F.dropout, "x", 0.1), True),
        (call(F.dropout, "x", 0.1, training=False), False),
        (call(F.dropout, "x", 0.0, training=True), False),
        (call(torch.dropout, "x", 0.1, True), True),
        (call(torch.dropout, "x", 0.1, False), False),
        (call(ATEN.dropout.default, "x", 0.1, True), True),
        (call(ATEN.native_dropout.default, "x", 0.1, True), True),
        (call(torch.rand_like, "x"), True),
        (call("bernoulli_", "x"), True),
        (call(ATEN.bernoulli.default, "x"), True),
        (call(F.rrelu, "x"), False),
        (call(F.rrelu, "x", training=True), True),
        (call(F.gelu, "x"), False),
    ],
    ids=str,
)
def test_randomness(node: fx.Node, random: bool) -> None:
    assert ops.is_random(node) is random
    if random:
        assert not ops.is_pure(node)


def test_mode_switches_and_sub_graphs_are_not_pure() -> None:
    assert ops.is_mode_switch(call(torch._C._set_grad_enabled, False))
    assert not ops.is_pure(call(torch._C._set_grad_enabled, False))
    cond = call(torch.ops.higher_order.cond, "x")
    assert ops.is_higher_order(cond) and not ops.is_pure(cond)


def test_functions_from_elsewhere_are_not_pure() -> None:
    def mine(x: object) -> object:
        return x

    assert not ops.is_pure(call(mine, "x"))
    assert ops.is_pure(call(operator.mul, "x", 2)) and ops.is_pure(call("mul", "x", 2))


def test_two_functions_of_one_name_are_told_apart() -> None:
    def make(factor: float) -> Callable[[Any], Any]:
        def act(x: Any) -> Any:
            return x * factor

        return act

    one, other = call(make(1.0), "x"), call(make(2.0), "x")
    assert ops.op_name(one) == ops.op_name(other) == "act"
    assert ops.op_identity(one) != ops.op_identity(other)
    assert ops.op_identity(call(F.silu, "x")) == "silu"


def test_arguments_by_position_and_keyword() -> None:
    node = call(F.linear, "x", weight=1)
    assert ops.argument(node, 1, "weight") == 1
    assert ops.argument(node, 2, "bias", "none") == "none"


def test_shape_values() -> None:
    tensor, size, sizes = call("size", "x"), call("size", "x", 0), call("view", "x")
    tensor.meta["example_value"] = torch.Size([2, 3])
    size.meta["example_value"] = 2
    sizes.meta["example_value"] = torch.empty(2, 3)
    assert ops.is_shape_value(tensor) and ops.is_shape_value(size) and not ops.is_shape_value(sizes)
    assert ops.is_shape_value(call("size", "x")) and not ops.is_shape_value(call("view", "x"))
