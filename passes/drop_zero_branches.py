"""Drop additions of zero: what is left of an attention that was replaced by a stub.

Before:
    y = add(x, 0)                               x: [batch, seq, hidden]
    z = zeros_like(x); m = mul(z, 0.22); y = add(x, m)
After:
    every reader of y reads x

Exact: x + 0 = x for every value but -0.0, whose sign an addition of zero clears. A branch is zero
when it is a literal, a tensor made of zeros, or such a tensor times a constant or moved by views.
An addition goes only if shape and dtype stay and neither side is written in place, since removing
a copy creates an alias.
Source: no capture folds these.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import ALIASING_OPS, DROPOUT_OPS, writes_in_place
from fxfusion.graph.pass_base import Pass, PassResult

_ZERO_MAKERS = frozenset("zeros zeros_like new_zeros".split())
_ZERO_KEEPERS = ALIASING_OPS | {"neg", "clone", "relu"} | DROPOUT_OPS


class DropZeroBranches(Pass):
    name: ClassVar[str] = "drop_zero_branches"
    exact: ClassVar[bool] = True

    def __init__(self, weights: frozenset[str]) -> None:
        """`weights`: names of the placeholders that hold module state."""
        self.weights = weights

    def run(self, graph: fx.Graph) -> PassResult:
        facts = GraphFacts(graph, self.weights)
        zero = _zero_values(graph, facts)
        changed = 0
        for node in list(graph.nodes):
            kept = _addition_of_zero(node, zero)
            if kept is None or not _interchangeable(node, kept):
                continue
            written = facts.effects.of[node].writes
            if written != (kept,) and _would_share_memory(node, kept, facts):
                continue
            if written and not facts.effects.is_private(kept):
                continue
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            changed += 1
        return PassResult(changed)


def _would_share_memory(node: fx.Node, kept: fx.Node, facts: GraphFacts) -> bool:
    """Whether the sum must stay a tensor of its own: it is written, or the caller would see an alias."""
    if facts.is_written(kept) or facts.is_written(node):
        return True
    return facts.effects.escapes(node) and (facts.effects.escapes(kept) or not facts.effects.is_private(kept))


def _zero_values(graph: fx.Graph, facts: GraphFacts) -> set[fx.Node]:
    zero: set[fx.Node] = set()
    is_zero = partial(_is_zero, zero)

    def is_constant(value: Any) -> bool:
        return value in facts.constants or value in zero if isinstance(value, fx.Node) else _is_number(value)

    for node in graph.nodes:
        name = ops.op_name(node)
        if ops.tensor_value(node) is None or facts.effects.of[node].writes or facts.is_written(node):
            continue
        fill = ops.argument(node, 2 if name == "new_full" else 1, "fill_value")
        made_zero = name in _ZERO_MAKERS or (name in ("full", "full_like", "new_full") and is_zero(fill))
        if made_zero or (name in _ZERO_KEEPERS and node.all_input_nodes and is_zero(ops.argument(node, 0, "input"))):
            zero.add(node)
        elif name in ("mul", "add", "sub") and len(node.args) == 2:
            # Zero times an activation is not zero where that is infinite or NaN; weights are taken as finite.
            sides = [is_zero(side) for side in node.args]
            if all(sides) or (name == "mul" and any(sides) and all(is_constant(side) for side in node.args)):
                zero.add(node)
    return zero


def _addition_of_zero(node: fx.Node, zero: set[fx.Node]) -> fx.Node | None:
    """The operand that an addition of zero leaves, or None."""
    if ops.op_name(node) not in ("add", "sub") or len(node.args) != 2 or set(node.kwargs) - {"alpha"}:
        return None
    left, right = node.args
    if _is_zero(zero, right) and isinstance(left, fx.Node):
        return left
    if _is_zero(zero, left) and isinstance(right, fx.Node) and ops.op_name(node) == "add" and not writes_in_place(node):
        return right if node.kwargs.get("alpha", 1) == 1 else None
    return None


def _is_zero(zero: set[fx.Node], value: Any) -> bool:
    return value in zero if isinstance(value, fx.Node) else _is_number(value) and value == 0


def _interchangeable(node: fx.Node, kept: fx.Node) -> bool:
    before, after = ops.tensor_value(node), ops.tensor_value(kept)
    if before is None or after is None:
        return False
    return before.dtype == after.dtype and ops.shape_of(node) == ops.shape_of(kept)


def _is_number(value: Any) -> bool:
    """A finite number: zero times infinity is no zero."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
