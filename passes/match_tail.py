"""What stands between an FFN's last linear layer and the residual addition.

Matches (no edit):
    b = scale * (h Wd^T + bd)         scale: a literal, one number or one per channel, [hidden]
    b = (h Wd^T) + bias
    casts and views that keep the channel axis, in any order
All of it can be folded into the down projection. A norm in this place cannot: see `match_output`.
Source: arXiv 2503.18908, equation 4; LayerScale: arXiv 2103.17239, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts, Slice
from fxfusion.graph.effects import writes_in_place
from fxfusion.passes.ffn import Linear, TailStep
from fxfusion.passes.match_output import NORM_BETWEEN, looks_like_norm, match_output
from fxfusion.passes.match_pieces import VIEWS, keeps_channels


@dataclass(frozen=True, slots=True)
class Tail:
    """The last linear layer of a branch and what is done to its result: `steps` that fold into it, or else `output`,
    every node up to the branch. `stopped_at`: the first one, seen from the branch, that does not fold; `down`'s where
    all do."""

    down: Linear
    stopped_at: fx.Node
    steps: tuple[TailStep, ...] = ()
    output: tuple[fx.Node, ...] = ()


def match_tail(branch: fx.Node, linears: Sequence[Linear], found: Slice, facts: GraphFacts) -> Tail:
    """The branch's last linear layer and what is done to its result. Raises `Refused`."""
    by_node = {linear.node: linear for linear in linears}
    steps: list[TailStep] = []
    node = branch
    while node not in by_node:
        walked = _step_back(node, facts)
        if walked is None or walked[0] not in set(found.nodes):
            output = match_output(branch, linears[-1].node, facts) if linears else ()
            if not output:
                raise _refusal(node, linears, found, facts)
            return Tail(linears[-1], node, output=output)
        node, step = walked
        if step is not None:
            steps.append(step)
    steps.reverse()
    return Tail(by_node[node], node, tuple(steps))


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


def _refusal(node: fx.Node, linears: Sequence[Linear], found: Slice, facts: GraphFacts) -> Refused:
    if not linears:
        return Refused(RefusalCode.LINEAR_COUNT, "the branch has no linear layer with constant weights", node)
    last = facts.order[linears[-1].node]
    after = [other for other in found.nodes if facts.order[other] > last]
    if looks_like_norm(after):
        return Refused(RefusalCode.OUTPUT_NORM, f"{NORM_BETWEEN}, and not of its result alone", node)
    return stands_between(node)


def stands_between(node: fx.Node) -> Refused:
    words = f"{ops.op_name(node)} stands between the last linear layer and the addition"
    return Refused(RefusalCode.STRUCTURE, words, node)
