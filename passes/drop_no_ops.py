"""Drop operations that return their input: same-dtype casts, inactive dropout, views that cancel.

Before:
    h = x.to(torch.float32)                    x: [batch, seq, hidden], float32 already
    d = dropout(h, 0.1, training=False)
    f = d.view(-1, hidden);  b = f.view(batch, seq, hidden);  g = d.view(-1, hidden)
After:
    every reader of h, d and b reads x, and every reader of g reads f

Exact: each dropped node returns the very tensor it was given (or an equal view of it), so results
keep every bit. Metadata assertions of `torch.export` go too: they were proved at capture.
Source: two captures of one model differ by exactly these nodes, and a cast of the stream
(`aten.to` in exported graphs) would hide it from the matcher.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import DROPOUT_OPS, dropout_arguments
from fxfusion.graph.pass_base import Pass, PassResult

_VIEWS = frozenset("view reshape view_as flatten unflatten squeeze unsqueeze expand expand_as broadcast_to".split())
_IDENTITIES = frozenset(("alias", "lift_fresh", "Identity"))
_DROPPED = ops.CASTS | _VIEWS | _IDENTITIES | DROPOUT_OPS | {"contiguous"}


class DropNoOps(Pass):
    name: ClassVar[str] = "drop_no_ops"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        facts = GraphFacts(graph, ())
        changed = 0
        views: dict[object, fx.Node] = {}
        for node in list(graph.nodes):
            name = ops.op_name(node)
            if name in ops.LINEARS:
                views.clear()  # a view for each branch: what stands in one is nothing for others to read
            if name == "_assert_tensor_metadata":
                graph.erase_node(node)
                changed += 1
            elif name not in _DROPPED or not node.all_input_nodes or not node.users:
                continue
            elif (same := _returned_input(node, facts) or _first_such_view(node, views, facts)) is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)  # by hand: a dropout marked `inplace` would count as a write
                changed += 1
        return PassResult(changed)


def _returned_input(node: fx.Node, facts: GraphFacts) -> fx.Node | None:
    """The value that the node hands back unchanged, or None."""
    name = ops.op_name(node)
    source = node.all_input_nodes[0]
    if name in ops.CASTS:
        if not (_same_kind(node, source) and ops.shape_of(node) == ops.shape_of(source)) or _asks_for_layout(node):
            return None
        return source if not (_copies(node) and _is_told_apart(node, source, facts)) else None
    if name in DROPOUT_OPS:
        probability, training = dropout_arguments(node)
        return source if training is False or probability == 0 else None
    if name in _IDENTITIES:
        return source
    if name == "contiguous":
        plain = _is_contiguous(source) and ops.shape_of(node) == ops.shape_of(source) and not _asks_for_layout(node)
        return source if plain else None
    if name in _VIEWS:
        return _cancelled_view(source, node, facts)
    return None


def _cancelled_view(source: fx.Node, node: fx.Node, facts: GraphFacts) -> fx.Node | None:
    """The value before a run of views that ends in the shape it began with."""
    start = source
    while True:
        if _same_kind(start, node) and ops.shape_of(start) == ops.shape_of(node):
            # A reshape may copy; handing back the original would then create an alias.
            return start if _is_contiguous(start) or not _is_told_apart(node, start, facts) else None
        if ops.op_name(start) not in _VIEWS or not start.all_input_nodes:
            return None
        start = start.all_input_nodes[0]


def _first_such_view(node: fx.Node, views: dict[object, fx.Node], facts: GraphFacts) -> fx.Node | None:
    """The same view of the same value, where the model wrote it before."""
    if ops.op_name(node) not in _VIEWS:
        return None
    key = (facts.mode[node], node.op, node.target, repr(node.args), repr(node.kwargs))
    first = views.setdefault(key, node)
    return None if first is node or _is_told_apart(node, first, facts) else first


def _copies(node: fx.Node) -> bool:
    """Whether a cast makes a new tensor even where the dtype stays."""
    by_position = any(value is True for value in node.args[1:])
    return by_position or bool(node.kwargs.get("copy")) or ops.schema_name(node) == "_to_copy"


def _is_told_apart(node: fx.Node, source: fx.Node, facts: GraphFacts) -> bool:
    """Whether it shows that two values share memory: one is written, or the caller gets the second."""
    return facts.is_written(source) or facts.effects.escapes(node)


def _asks_for_layout(node: fx.Node) -> bool:
    formats = [value for value in (*node.args[1:], *node.kwargs.values()) if isinstance(value, torch.memory_format)]
    return any(value is not torch.preserve_format for value in formats)


def _same_kind(one: fx.Node, other: fx.Node) -> bool:
    left, right = ops.tensor_value(one), ops.tensor_value(other)
    return left is not None and right is not None and left.dtype == right.dtype and left.device == right.device


def _is_contiguous(node: fx.Node) -> bool:
    """Whether the value is known to lie in memory row by row."""
    value = ops.tensor_value(node)
    if value is None or value.layout != torch.strided:
        return False
    steps = [1]  # compared as text: to ask for the truth of a symbolic comparison adds a guard
    for size in reversed(value.shape):
        steps.append(steps[-1] * size)
    return [str(stride) for stride in reversed(value.stride())] == [str(step) for step in steps[:-1]]
