"""The residual blocks of a captured model: attention (any mixer), FFNs, whole decoder layers.

    x ─┬─ norm ─ attention ─ o ─ add(x, o) ─ y       mixer: before x, after y
       └─ norm ─ attention ─ add(attention, ffn) ─ add(x, ...)      parallel: before ffn, after the inner add

To remove a block is to put its `before` where its `after` was; everything else of the graph stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from fxfusion.capture import CapturedGraph
from fxfusion.errors import CaptureError
from fxfusion.graph import ops, provenance
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.passes.ffn import FfnNode, Mixer
from fxfusion.passes.match_residual import match_residual, mixes_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualBlock:
    """A part of the model that adds something to the residual stream.

    `layer`: position of its decoder layer. `name`: module path. `stream`: the residual stream that it
    reads, `[..., hidden]`. `after - before`: what it contributes. For a mixer beside an FFN (a parallel
    block) `before` is the FFN's branch; everywhere else `before` is the stream.
    """

    kind: Literal["mixer", "ffn", "layer"]
    layer: int
    name: str
    stream: fx.Node
    before: fx.Node
    after: fx.Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """All residual blocks of one graph, each kind in graph order."""

    mixers: tuple[ResidualBlock, ...]
    ffns: tuple[ResidualBlock, ...]
    layers: tuple[ResidualBlock, ...]

    def mixers_of(self, layers: Iterable[int]) -> tuple[ResidualBlock, ...]:
        """The mixers of some decoder layers."""
        wanted = set(layers)
        return tuple(block for block in self.mixers if block.layer in wanted)


def find_blocks(captured: CapturedGraph, tokens: int) -> Blocks:
    """Find the blocks of a normalised graph (`pipeline.normalising_passes`) of a model run on so many tokens.

    Raises `CaptureError` where no block is found, or one belongs to no numbered layer.
    """
    graph = captured.module.graph
    facts = GraphFacts(graph, (node for node in graph.nodes if node.name in captured.weights))
    matches = match_residual(facts, {})
    found: list[FfnNode | Mixer] = sorted(
        (*matches.ffns, *(mixer for mixer in matches.mixers if _is_block(mixer, facts, tokens))),
        key=lambda block: facts.order[block.add],
    )
    if not found:
        raise CaptureError("the model has no residual blocks: no attention or FFN is added to a stream")
    numbers = _numbers(found)
    pairs = list(zip(found, numbers, strict=True))
    mixers = [_mixer(block, number, facts) for block, number in pairs if isinstance(block, Mixer)]
    ffns = [_ffn(block, number) for block, number in pairs if isinstance(block, FfnNode)]
    return Blocks(mixers=tuple(mixers), ffns=tuple(ffns), layers=_layers(found, numbers, facts))


def _is_block(mixer: Mixer, facts: GraphFacts, tokens: int) -> bool:
    """Whether the addition is one to the stream, `[..., hidden]`, not one inside the mixer (rotary angles, masks)."""
    summed = ops.tensor_value(mixer.add)
    if summed is None or summed.dim() > 3 or summed.numel() != tokens * summed.shape[-1]:
        return False
    return _cut(mixer, facts) is not None


def _numbers(found: Sequence[FfnNode | Mixer]) -> list[int]:
    numbers = provenance.layer_numbers([block.layer for block in found])
    for block, number in zip(found, numbers, strict=True):
        if number is None:
            raise CaptureError(f"{block.add} belongs to no numbered layer (its module path is {block.layer!r})")
    return [number for number in numbers if number is not None]


def _mixer(mixer: Mixer, layer: int, facts: GraphFacts) -> ResidualBlock:
    cut = _cut(mixer, facts)
    assert cut is not None
    after, before = cut
    stream = _other_operand(mixer.add, set(mixer.nodes))
    own = [node for node in mixer.nodes if provenance.module_path(node).startswith(f"{mixer.layer}.")]
    mixing = [node for node in own if mixes_tokens(node, facts)]  # not those that make masks and rotary angles
    return ResidualBlock(
        kind="mixer", layer=layer, name=provenance.common_path(mixing), stream=stream, before=before, after=after
    )


def _cut(mixer: Mixer, facts: GraphFacts) -> tuple[fx.Node, fx.Node] | None:
    """The addition that brings the mixer's result in, and its other operand: the first one after the mixing
    whose other operand knows nothing of it."""
    inside = set(mixer.nodes)
    tainted: set[fx.Node] = set()
    for node in (*mixer.nodes, mixer.add):
        sources = node.all_input_nodes
        if (node is not mixer.add and mixes_tokens(node, facts)) or not tainted.isdisjoint(sources):
            tainted.add(node)
    for node in (*mixer.nodes, mixer.add):
        if ops.op_name(node) != "add" or not _shaped_like(node, mixer.add):
            continue
        clean = [source for source in node.all_input_nodes if source not in tainted and source not in facts.constants]
        dirty = [source for source in node.all_input_nodes if source in tainted]
        if len(clean) == 1 and len(dirty) == 1 and (clean[0] in inside or node is mixer.add):
            return node, clean[0]
    return None


def _shaped_like(node: fx.Node, other: fx.Node) -> bool:
    one, two = ops.tensor_value(node), ops.tensor_value(other)
    return one is not None and two is not None and one.numel() == two.numel() and one.shape[-1] == two.shape[-1]


def _other_operand(add: fx.Node, inside: set[fx.Node]) -> fx.Node:
    return next(source for source in add.all_input_nodes if source not in inside)


def _ffn(ffn: FfnNode, layer: int) -> ResidualBlock:
    return ResidualBlock(kind="ffn", layer=layer, name=ffn.name, stream=ffn.stream, before=ffn.stream, after=ffn.add)


def _layers(found: Sequence[FfnNode | Mixer], numbers: Sequence[int], facts: GraphFacts) -> tuple[ResidualBlock, ...]:
    """Whole decoder layers: each ends where the next begins, the last with its last addition to the stream."""
    starts: dict[int, tuple[fx.Node, str]] = {}
    for block, number in zip(found, numbers, strict=True):
        inside = set(block.nodes)
        starts.setdefault(number, (_other_operand(block.add, inside), block.layer))
    ends = [stream for stream, _ in list(starts.values())[1:]]
    last_layer = list(starts.values())[-1][1]
    ends.append(_last_addition(found[-1].add, last_layer, facts))
    return tuple(
        ResidualBlock(kind="layer", layer=number, name=layer, stream=stream, before=stream, after=end)
        for (number, (stream, layer)), end in zip(starts.items(), ends, strict=True)
    )


def _last_addition(known: fx.Node, layer: str, facts: GraphFacts) -> fx.Node:
    """The last addition of stream shape in a layer; an FFN that was not matched may end it."""
    last = known
    for node in facts.graph.nodes:
        if ops.op_name(node) == "add" and facts.order[node] > facts.order[last] and _shaped_like(node, known):
            path = provenance.module_path(node)
            if node not in facts.constants and (path == layer or path.startswith(f"{layer}.")):
                last = node
    return last
