"""What a node does, whatever the capture spelled it as.

Dynamo writes `torch.nn.functional.silu` and `operator.iadd`, `torch.export` writes
`aten.silu.default` and `aten.add_.Tensor`, `symbolic_trace` writes methods. All of them get one name
here: the bare operation, plus whether it writes in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fxfusion.torch_private import HigherOrderOperator, OpOverload

_OPERATOR_NAMES = {
    "truediv": "div",
    "itruediv": "div",
    "floordiv": "floor_divide",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "invert": "bitwise_not",
}
_IN_PLACE_OPERATORS = {
    getattr(operator, name): name[1:]
    for name in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "ifloordiv", "iand", "ior", "ixor")
}
_IN_PLACE_METHODS = {"setitem": "setitem"} | {
    function.__name__: _OPERATOR_NAMES.get(name, name) for function, name in _IN_PLACE_OPERATORS.items()
}
_INPLACE_POSITION = (
    dict.fromkeys("relu relu6 selu silu mish hardswish hardsigmoid".split(), 1)
    | dict.fromkeys("elu celu leaky_relu".split(), 2)
    | dict.fromkeys("hardtanh threshold".split(), 3)
    | dict.fromkeys("dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split(), 3)
    | {"rrelu": 4}
)
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
RANDOM_OPS = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm bernoulli multinomial normal uniform "
    "exponential geometric cauchy log_normal random poisson native_dropout rrelu_with_noise".split()
)
DROPOUT_OPS = frozenset(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split()
)
MODE_SWITCHES = frozenset(
    "_enter_autocast _exit_autocast _set_grad_enabled set_grad_enabled _enter_inference_mode "
    "_exit_inference_mode _enter_dual_level _saved_tensors_hooks_disable _saved_tensors_hooks_enable".split()
)
ALIASING_OPS = frozenset(
    "view reshape view_as reshape_as flatten unflatten transpose permute t mT T H swapaxes getitem select slice "
    "narrow chunk split split_with_sizes tensor_split unbind squeeze unsqueeze expand expand_as contiguous to "
    "type_as float double half bfloat16 alias detach dropout ravel diagonal as_strided movedim real "
    "numpy_T lift_fresh Identity getattr positive conj resolve_conj resolve_neg adjoint imag view_as_real "
    "view_as_complex moveaxis broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d hsplit vsplit dsplit "
    "unsafe_chunk unsafe_split sum_to_size unfold einsum cpu cuda bool int long short alpha_dropout "
    "feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split()
)
"""Operations whose result may share memory with their first tensor."""


def op_name(node: fx.Node) -> str:
    """The bare name of the operation: `add`, `linear`, `silu`; empty for nodes that call nothing."""
    return _bare_name(node.op, node.target)[0]


def schema_name(node: fx.Node) -> str:
    """The name that ATen gives an operation, such as `_to_copy`; empty for other spellings."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, OpOverload) else ""


def op_identity(node: fx.Node) -> str:
    """`op_name`, but different for two functions of the user's own that share a name."""
    name = op_name(node)
    if node.op == "call_function" and not isinstance(node.target, OpOverload) and not _is_torch_function(node.target):
        return f"{name}@{id(node.target)}"
    return name


def writes_in_place(node: fx.Node) -> bool:
    """Whether the node writes one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if op_name(node) in DROPOUT_OPS and dropout_arguments(node)[1] is False:
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    return _bare_name(node.op, node.target)[1] or _positional_inplace(node)


def written_argument(node: fx.Node) -> fx.Node | None:
    """The value that an in-place node writes."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    first = node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers (a dropout in training mode with p > 0 does)."""
    name = op_name(node)
    if name in DROPOUT_OPS:
        probability, training = dropout_arguments(node)
        return training is not False and probability != 0
    if name == "rrelu":
        return node.kwargs.get("training", node.args[3] if len(node.args) > 3 else False) is not False
    if name == "scaled_dot_product_attention" and argument(node, 4, "dropout_p", 0.0) == 0.0:
        return False  # its ATen tag says what it might do
    if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    return name in RANDOM_OPS


def dropout_arguments(node: fx.Node) -> tuple[Any, Any]:
    """`(p, training)` of a dropout node, literals or nodes."""
    probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    functional = not isinstance(node.target, OpOverload) and getattr(node.target, "__module__", "") != "torch"
    default = bool(functional)
    training = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else default))
    return probability, training


def is_mode_switch(node: fx.Node) -> bool:
    """Whether the node changes autocast, grad, inference mode or the level of vmap for the nodes after it."""
    name = op_name(node)
    return name in MODE_SWITCHES or name.endswith(("_increment_nesting", "_decrement_nesting"))


def is_higher_order(node: fx.Node) -> bool:
    """Whether the node calls a sub-graph (activation checkpointing, cond, flex attention)."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def is_pure(node: fx.Node) -> bool:
    """Whether the node can go when nobody reads it: no write, no random number, no other effect."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if op_name(node) == "_log_api_usage_once":
        return True
    if writes_in_place(node) or is_random(node) or is_mode_switch(node) or is_higher_order(node):
        return False
    if op_name(node).startswith(("_assert", "sym_constrain", "_check", "manual_seed", "set_")):
        return False
    if isinstance(node.target, OpOverload):
        return node.target.namespace in ("aten", "prims", "prim") and not node.is_impure()
    return node.op == "call_method" or _is_torch_function(node.target)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A call's argument by position or keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def tensor_value(node: fx.Node) -> torch.Tensor | None:
    """The example (fake) tensor that a capture recorded for the node."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


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
def _bare_name(op: str, target: Any) -> tuple[str, bool]:
    """(name without underscore suffix, whether that suffix or the operator says "in place")."""
    if op == "call_method":
        name = str(target)
    elif op != "call_function":
        return "", False
    elif isinstance(target, OpOverload):
        name = target._schema.name.split("::")[-1]
    elif target in _IN_PLACE_OPERATORS:
        name = _IN_PLACE_OPERATORS[target]
        return _OPERATOR_NAMES.get(name, name), True
    elif target is operator.setitem:
        return "setitem", True
    else:
        name = getattr(target, "__name__", str(target))
    in_place = name.endswith("_") and not name.endswith("__") and name not in _OPERATOR_NAMES
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name in _IN_PLACE_METHODS:
            return _IN_PLACE_METHODS[name], True
    elif in_place:
        name = name[:-1]
    name = _OPERATOR_NAMES.get(name, name)
    return _SAME_OP.get(name, name), in_place


def _positional_inplace(node: fx.Node) -> bool:
    """`F.dropout(x, p, training, True)` and `F.relu(x, True)` pass `inplace` by position."""
    position = _INPLACE_POSITION.get(op_name(node))
    return position is not None and len(node.args) > position and node.args[position] is True


def _is_torch_function(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    if module in ("_operator", "operator", "math", "builtins", "torch") or module.startswith("torch."):
        return True
    return target in (getattr,) or type(target).__name__ == "builtin_function_or_method"
