"""One name for each operation, whatever the capture spelled it as."""

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
