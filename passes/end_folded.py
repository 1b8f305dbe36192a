"""The end of an FFN that folds into its last linear layer: scales and shifts up to the residual addition.

Matches (no edit):
    b = scale * (h Wd^T + bd)         scale: a literal, one number or one per channel, [hidden]
    b = (h Wd^T) + bias
    casts and views that keep the channel axis, in any order
Builds (searches nothing):
    b = h Wd^T + bd                   h: [..., sum of widths]: all members' middles, side by side
        Wd = cat_i(scale_i * Wd_i, dim=1): [hidden, sum of widths];  bd = sum_i(scale_i * bd_i + bias_i): [hidden]

Exact: products and sums are taken in float32 or wider and rounded once to the weight's dtype.
Source: arXiv 2503.18908, equation 4 and theorem 3.1; LayerScale: arXiv 2103.17239, section 2.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts, Slice
from fxfusion.graph.effects import writes_in_place
from fxfusion.passes.build_wide import WideBuilder, out_in, wide_dtype
from fxfusion.passes.ffn import End, FfnNode, Linear, TailStep
from fxfusion.passes.match_pieces import VIEWS, keeps_channels


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedEnd(End):
    """`steps` are all there is."""

    def branches(self, wide: WideBuilder) -> Iterator[tuple[fx.Node, fx.Node]]:
        down = wide.linear(wide.group.middle.joined(wide), down_weight(wide), _down_bias(wide))
        yield down, wide.group.members[-1].branch


def match_folded(
    branch: fx.Node, linears: Sequence[Linear], found: Slice, facts: GraphFacts, before: Refused
) -> tuple[Linear, End] | Refused:
    """The branch's last linear layer and what is done to its result."""
    by_node = {linear.node: linear for linear in linears}
    steps: list[TailStep] = []
    node = branch
    while node not in by_node:
        walked = _step_back(node, facts)
        if walked is None or walked[0] not in set(found.nodes):
            words = f"{ops.op_name(node)} stands between the last linear layer and the addition"
            return Refused(RefusalCode.STRUCTURE, words, node)
        node, step = walked
        if step is not None:
            steps.append(step)
    return by_node[node], FoldedEnd(steps=tuple(reversed(steps)))


def _step_back(node: fx.Node, facts: GraphFacts) -> tuple[fx.Node, TailStep | None] | None:
    """The value that a tail node shows, scales or shifts, with what it does to it."""
    name = ops.op_name(node)
    first = ops.argument(node, 0, "input")
    if isinstance(first, fx.Node) and (_only_rounds(node, name) or (name in VIEWS and keeps_channels(node, first))):
        return first, None
    if name not in ("mul", "add", "div") or len(node.args) != 2 or node.kwargs or writes_in_place(node):
        return None
    value, constant = node.args
    if name != "div" and _is_constant(value, facts):
        value, constant = constant, value
    if not isinstance(value, fx.Node) or value in facts.constants or not _is_constant(constant, facts):
        return None
    if isinstance(constant, fx.Node):
        if name == "div" or not _is_per_channel(constant):
            return None
        return value, ("mul" if name == "mul" else "add", constant)
    if name == "add":
        return None
    assert isinstance(constant, (int, float))
    return value, ("mul", float(constant) if name == "mul" else 1.0 / constant)


def _only_rounds(node: fx.Node, name: str) -> bool:
    """Whether the node is a cast to a float of 16 bits or more."""
    value = ops.tensor_value(node)
    return name in ops.CASTS and value is not None and value.dtype.is_floating_point and value.dtype.itemsize > 1


def _is_constant(value: Any, facts: GraphFacts) -> bool:
    if isinstance(value, fx.Node):
        return value in facts.constants
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _is_per_channel(node: fx.Node) -> bool:
    example = ops.tensor_value(node)
    return example is not None and all(size == 1 for size in example.shape[:-1])


def down_weight(wide: WideBuilder) -> fx.Node:
    """`[hidden, sum of widths]`, scales folded in."""
    parts = []
    for member in wide.group.members:
        weight = out_in(wide.editor, member.down)
        dtype = wide_dtype(weight)
        for kind, value in member.end.steps:
            if kind == "mul":
                factor = value
                if isinstance(value, fx.Node):
                    factor = wide.editor.method("unsqueeze", wide.to(wide.vector(value, member.hidden), dtype), -1)
                weight = wide.editor.call(operator.mul, wide.to(weight, dtype), factor)
        parts.append(wide.to(weight, ops.tensor_of(member.down.weight).dtype))
    return wide.joined(parts, 1)


def _down_bias(wide: WideBuilder) -> fx.Node | None:
    """`[hidden]`: the sum of the members' biases and shifts, or None where there are none."""
    parts = [part for member in wide.group.members if (part := _bias_of(wide, member)) is not None]
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = wide.editor.call(operator.add, total, part)
    return wide.packed(wide.to(total, ops.tensor_of(wide.group.members[0].down.weight).dtype))


def _bias_of(wide: WideBuilder, member: FfnNode) -> fx.Node | None:
    dtype = wide_dtype(member.down.weight)
    bias: fx.Node | None = wide.to(member.down.bias, dtype) if member.down.bias is not None else None
    for kind, value in member.end.steps:
        factor = wide.to(wide.vector(value, member.hidden), dtype) if isinstance(value, fx.Node) else value
        if bias is not None:
            bias = wide.editor.call(operator.mul if kind == "mul" else operator.add, bias, factor)
        elif kind == "add" and isinstance(factor, fx.Node):
            bias = factor
    return bias
