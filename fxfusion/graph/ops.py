"""The name of what a node computes, whatever the capture spelled it as. What it does beside: see `effects`.

Dynamo writes `torch.nn.functional.silu` and `operator.iadd`, `torch.export` writes
`aten.silu.default` and `aten.add_.Tensor`, `symbolic_trace` writes methods. All of them get one name
here: the bare operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fxfusion.graph.torch_private import OpOverload, size_hint

LINEARS = frozenset("linear addmm matmul mm bmm baddbmm einsum bilinear".split())
"""Products with a weight, whatever the weight is; where one stands, a branch has begun."""

CASTS = frozenset("to type_as float double half bfloat16".split())
"""What changes the dtype of floats."""

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


def example(node: fx.Node) -> Any:
    """What a capture recorded for the node: fake tensors, sizes, numbers; None where it recorded nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def plain_example(node: fx.Node) -> Any:
    """The number, dtype or sizes that the node stands for, symbolic ones by their hints."""
    value = example(node)
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(size_hint, value))
    return value if isinstance(value, (int, float, torch.dtype, torch.device)) else size_hint(value)


def tensor_value(node: Any) -> torch.Tensor | None:
    """The example (fake) tensor of a node; None for anything else."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The example tensor of a node that is known to have one."""
    value = tensor_value(node)
    assert value is not None, f"{node} has no example value"
    return value


def shape_of(node: fx.Node) -> tuple[str, ...]:
    """The sizes of a tensor as text, since to compare symbolic ones adds guards; none for anything else."""
    value = tensor_value(node)
    return () if value is None else tuple(map(str, value.shape))


def dtype_name(node: fx.Node) -> str:
    """The dtype of a tensor, without its module; empty for anything else."""
    return str(getattr(tensor_value(node), "dtype", "")).removeprefix("torch.")


def device_of(node: fx.Node) -> torch.device | None:
    """Where the node's value is; None for what is no tensor, and for single numbers, which may be anywhere."""
    value = tensor_value(node)
    return None if value is None or value.dim() == 0 else value.device


def is_shape_value(node: fx.Node) -> bool:
    """Whether the node is a size, a number or a tuple of sizes rather than a tensor."""
    value = node.meta.get("example_value", node.meta.get("val"))  # as `example`; this is asked the most
    if value is None:
        return op_name(node) in ("size", "sym_size", "shape", "dim", "numel", "getattr")
    if isinstance(value, (list, tuple)):
        return all(not isinstance(item, torch.Tensor) for item in value)
    return not isinstance(value, torch.Tensor)


def compute(node: fx.Node, value_of: Callable[[fx.Node], Any], literal: Callable[[Any], Any] | None = None) -> Any:
    """What the node computes of other values for its arguments, and of what `literal` makes of numbers and dtypes."""

    def made(found: Any) -> Any:
        found = value_of(found) if isinstance(found, fx.Node) else found
        return found if literal is None else literal(found)

    each = (node.args, dict(node.kwargs))
    args, kwargs = fx.node.map_arg(each, value_of) if literal is None else fx.node.map_aggregate(each, made)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op != "call_function" or not callable(node.target):
        raise TypeError(f"{node.format_node()} is no call of a function")
    return node.target(*args, **kwargs)


def reached(
    start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]] | None = None
) -> dict[fx.Node, None]:
    """The nodes, and all that are reached from them in steps: from a node to its inputs, where nothing else is said."""
    found = dict.fromkeys(start)
    pending = list(found)
    while pending:
        node = pending.pop()
        new = [other for other in (step(node) if step else node.all_input_nodes) if other not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return found


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
