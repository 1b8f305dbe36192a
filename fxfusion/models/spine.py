"""Follow the residual stream of a captured model from its last addition back to the embedding.

    embedding ── add(x0, attention) ── add(x1, ffn) ── ... ── add(x23, ffn) ── final norm ── logits

Additions inside a branch (rotary angles, gates, shared experts) are not on the way, so they are not
taken for additions to the stream, whatever their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxfusion.graph import ops, provenance
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.passes.match_residual import linear_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """`add = stream + branch`, `[..., hidden]`. `reads`: what the branch is computed from, by `nodes`.

    `reads` is `stream`, or, where a layer adds two branches that read the same value, what came before
    the first of them: `(x + attention(x)) + ffn(x)`. `layer`: path of the decoder layer, empty outside.
    """

    add: fx.Node
    stream: fx.Node
    branch: fx.Node
    reads: fx.Node
    nodes: tuple[fx.Node, ...]
    layer: str


def follow_stream(facts: GraphFacts, tokens: int) -> tuple[Addition, ...]:
    """The additions to the stream, in graph order. `tokens`: how many the graph was captured on."""
    candidates: dict[fx.Node, Addition] = {}
    for node in facts.graph.nodes:
        found = _addition(node, candidates, facts, tokens)
        if found is not None:
            candidates[node] = found
    spine: list[Addition] = []
    current = max(candidates, key=facts.order.__getitem__, default=None)
    while current is not None:
        spine.append(candidates[current])
        current = _previous(candidates[current].stream, candidates, facts)
    return tuple(reversed(spine))


def _addition(add: fx.Node, earlier: Mapping[fx.Node, Addition], facts: GraphFacts, tokens: int) -> Addition | None:
    """An addition of stream shape to a value computed from it with weights."""
    operands = add.all_input_nodes
    if ops.op_name(add) != "add" or len(operands) != 2 or not facts.constants.isdisjoint(operands):
        return None
    if not all(_is_stream_shaped(node, tokens) for node in (add, *operands)):
        return None
    first, second = sorted(operands, key=facts.order.__getitem__)
    readings = [(first, second, first)]
    for stream, branch in ((first, second), (second, first)):
        if stream in earlier:
            readings.append((stream, branch, earlier[stream].reads))
    for stream, branch, reads in readings:
        found = facts.slice_between(branch, reads)
        if found.reaches_stop and any(ops.op_name(node) in ops.LINEARS for node in found.nodes):
            layer = provenance.owning_layer(linear_layers(found, facts), add)
            return Addition(add=add, stream=stream, branch=branch, reads=reads, nodes=found.nodes, layer=layer)
    return None


def _is_stream_shaped(node: fx.Node, tokens: int) -> bool:
    value = ops.tensor_value(node)
    return (
        value is not None
        and value.is_floating_point()
        and 1 < value.dim() <= 3
        and value.numel() == tokens * value.shape[-1]
    )


def _previous(stream: fx.Node, candidates: Mapping[fx.Node, Addition], facts: GraphFacts) -> fx.Node | None:
    """The last addition that a value of the stream was computed from: itself, or what a norm or scale reads."""
    found: set[fx.Node] = set()
    pending, seen = [stream], {stream}
    while pending:
        node = pending.pop()
        if node in candidates:
            found.add(node)
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return max(found, key=facts.order.__getitem__, default=None)
