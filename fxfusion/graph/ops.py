"""The name of what a node computes, whatever the capture spelled it as. What it does beside: see `effects`.

Dynamo writes `torch.nn.functional.silu` and `operator.iadd`, `torch.export` writes
`aten.silu.default` and `aten.add_.Tensor`, `symbolic_trace` writes methods. All of them get one name
here: the bare operation.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fxfusion.graph.torch_private import OpOverload

LINEARS = frozenset("linear addmm matmul mm bmm baddbmm einsum bilinear".split())
"""Products with a weight, whatever the weight is; where one stands, a branch has begun."""

_OPERATOR_NAMES = {
    "truediv": "div",
    "itruediv": "div",
    "floordiv": "floor_divide",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "invert": "bitwise_not",
}
IN_PLACE_OPERATORS = {
    getattr(operator, name): name[1:]
    for name in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "ifloordiv", "iand", "ior", "ixor")
}
_IN_PLACE_METHODS = {"setitem": "setitem"} | {
    function.__name__: _OPERATOR_NAMES.get(name, name) for function, name in IN_PLACE_OPERATORS.items()
}
_SAME_OP = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "type": "to",
    "_threshold": "threshold",
    "_to_copy": "to",
    "_unsafe_view": "view",
    "_reshape_alias": "reshape",
    "numpy_T": "t",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}


def op_name(node: fx.Node) -> str:
    """The bare name of the operation: `add`, `linear`, `silu`; empty for nodes that call nothing."""
    return bare_name(node.op, node.target)[0]


def schema_name(node: fx.Node) -> str:
    """The name that ATen gives an operation, such as `_to_copy`; empty for other spellings."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, OpOverload) else ""


def op_identity(node: fx.Node) -> str:
    """`op_name`, but different for two functions of the user's own that share a name."""
    name = op_name(node)
    if node.op == "call_function" and not isinstance(node.target, OpOverload) and not _is_torch_function(node.target):
        return f"{name}@{id(node.target)}"
    return name


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A call's argument by position or keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def tensor_value(node: fx.Node) -> torch.Tensor | None:
    """The example (fake) tensor that a capture recorded for the node."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def device_of(node: fx.Node) -> torch.device | None:
    """Where the node's value is; None for what is no tensor, and for single numbers, which may be anywhere."""
    value = tensor_value(node)
    return None if value is None or value.dim() == 0 else value.device


def is_shape_value(node: fx.Node) -> bool:
    """Whether the node is a size, a number or a tuple of sizes rather than a tensor."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if value is None:
        return op_name(node) in ("size", "sym_size", "shape", "dim", "numel", "getattr")
    if isinstance(value, (list, tuple)):
        return all(not isinstance(item, torch.Tensor) for item in value)
    return not isinstance(value, torch.Tensor)


def nodes_of(value: Any) -> Iterator[fx.Node]:
    """Every node inside a nested argument."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(value, note)
    yield from found


@lru_cache(maxsize=4096)
def bare_name(op: str, target: Any) -> tuple[str, bool]:
    """(name without underscore suffix, whether that suffix or the operator says "in place")."""
    if op == "call_method":
        name = str(target)
    elif op != "call_function":
        return "", False
    elif isinstance(target, OpOverload):
        name = target._schema.name.split("::")[-1]
    elif target in IN_PLACE_OPERATORS:
        name = IN_PLACE_OPERATORS[target]
        return _OPERATOR_NAMES.get(name, name), True
    elif target is operator.setitem:
        return "setitem", True
    else:
        name = getattr(target, "__name__", str(target))
    of_operator = getattr(target, "__module__", "") == "_operator"  # `and_`, `not_` only avoid keywords
    in_place = name.endswith("_") and not name.endswith("__") and not of_operator
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name in _IN_PLACE_METHODS:
            return _IN_PLACE_METHODS[name], True
    elif in_place:
        name = name[:-1]
    name = _OPERATOR_NAMES.get(name, name)
    return _SAME_OP.get(name, name), in_place


def _is_torch_function(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    if module in ("_operator", "operator", "math", "builtins", "torch") or module.startswith("torch."):
        return True
    return target in (getattr,) or type(target).__name__ == "builtin_function_or_method"
