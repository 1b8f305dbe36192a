"""The residual blocks of a captured model: attention (any mixer), FFNs, whole decoder layers.

    x ─┬─ norm ─ attention ─ o ─ add(x, o) ─ y       mixer: before x, after y
       └─ norm ─ attention ─ add(attention, ffn) ─ add(x, ...)      parallel: before ffn, after the inner add

The stream is followed from its last addition back to the embedding:

    embedding ── add(x0, attention) ── add(x1, ffn) ── ... ── add(x23, ffn) ── final norm ── logits

Additions inside a branch (rotary angles, gates, shared experts) are not on the way, so they are not
taken for additions to the stream, whatever their shape.

To remove a block is to put its `before` where its `after` was; everything else of the graph stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from torch import fx

from fxfusion.compiler.capture import CapturedGraph
from fxfusion.errors import CaptureError
from fxfusion.graph import ops, provenance
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import ALIASING_OPS
from fxfusion.passes.ffn import FfnNode, Mixer
from fxfusion.passes.match_pieces import behind_views
from fxfusion.passes.match_residual import ROUTERS, linear_layers, match_residual, mixes_tokens, residual_operands

# What may stand between an attention and the stream without making one value of it and its neighbours.
_LINEAR_OPS = ALIASING_OPS | {"mul", "div", "neg"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualBlock:
    """A part of the model that adds something to the residual stream.

    `layer`: position of its decoder layer. `name`: module path. `stream`: the residual stream that it
    reads, `[..., hidden]`. `after - before`: what it contributes. For a mixer beside an FFN (a parallel
    block) `before` is the FFN's branch; everywhere else `before` is the stream.

    `branches`: the values whose sum is the contribution to the stream, not yet rounded into the stream:
    more exact than `after - before` in low precision. Empty where something else than additions stands
    between them and the stream (a scale, a norm, a cast).
    """

    kind: Literal["mixer", "ffn", "layer"]
    layer: int
    name: str
    stream: fx.Node
    before: fx.Node
    after: fx.Node
    branches: tuple[fx.Node, ...] = ()


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
    facts = GraphFacts(captured.module.graph, captured.weights)
    spine = follow_stream(facts, tokens)
    numbers = _numbers(spine)
    matches = match_residual(facts, {})
    beside = _mixers_beside(spine, facts)
    mixers = [
        _mixer(match, _number(match, numbers), facts) for match in (*matches.mixers, *beside) if match.add in numbers
    ]
    ffns = [_ffn(match, _number(match, numbers)) for match in matches.ffns if match.add in numbers]
    if not mixers and not ffns:
        raise CaptureError("the model has no residual blocks: no attention or FFN is added to a stream")
    return Blocks(
        mixers=tuple(sorted(mixers, key=lambda block: facts.order[block.after])),
        ffns=tuple(ffns),
        layers=_layers(spine, numbers, facts),
    )


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
    operands = residual_operands(add, facts)
    if operands is None or not all(_is_stream_shaped(node, tokens) for node in (add, *operands)):
        return None
    first, second = operands
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
    return value is not None and 1 < value.dim() <= 3 and value.numel() == tokens * value.shape[-1]


def _previous(stream: fx.Node, candidates: Mapping[fx.Node, Addition], facts: GraphFacts) -> fx.Node | None:
    """The last addition that a value of the stream was computed from: itself, or what a norm or scale reads."""
    found = ops.reached([stream], lambda node: () if node in candidates else node.all_input_nodes)
    return max(candidates.keys() & set(found), key=facts.order.__getitem__, default=None)


def _mixers_beside(spine: Sequence[Addition], facts: GraphFacts) -> list[Mixer]:
    """Mixers that are added after an FFN that reads the same value, `(x + ffn(x)) + attention(x)`: the matcher
    of residual nodes sees a branch there that reads something else than the sum it is added to."""
    found = []
    for addition in spine:
        names = {ops.op_name(node) for node in addition.nodes}
        mixing = [node for node in addition.nodes if mixes_tokens(node, facts)]
        if addition.reads is not addition.stream and mixing and names.isdisjoint(ROUTERS):
            op, nodes = ops.op_name(mixing[0]), addition.nodes
            mixer = Mixer(add=addition.add, stream=addition.stream, leaks=(), nodes=nodes, op=op, layer=addition.layer)
            found.append(mixer)
    return found


def _numbers(spine: Sequence[Addition]) -> dict[fx.Node, int | None]:
    """The layer number of each addition to the stream; None where it stands outside the layers."""
    numbers = provenance.layer_numbers([addition.layer for addition in spine])
    return {addition.add: number for addition, number in zip(spine, numbers, strict=True)}


def _number(match: FfnNode | Mixer, numbers: Mapping[fx.Node, int | None]) -> int:
    number = numbers[match.add]
    if number is None:
        raise CaptureError(f"{match.add} belongs to no numbered layer (its module path is {match.layer!r})")
    return number


def _mixer(mixer: Mixer, layer: int, facts: GraphFacts) -> ResidualBlock:
    before, after, branch, is_scaled = _cut(mixer, facts)
    own = [node for node in mixer.nodes if provenance.module_path(node).startswith(f"{mixer.layer}.")]
    mixing = [node for node in own if mixes_tokens(node, facts)]  # not those that make masks and rotary angles
    return ResidualBlock(
        kind="mixer",
        layer=layer,
        name=provenance.common_path(mixing) or mixer.layer,
        stream=mixer.stream,
        before=before,
        after=after,
        branches=() if is_scaled or not _adds_plainly(after) else (branch,),
    )


def _cut(mixer: Mixer, facts: GraphFacts) -> tuple[fx.Node, fx.Node, fx.Node, bool]:
    """Where the mixer's result comes in: `(before, after, branch, is_scaled)`, with after = before + branch.

    That is the addition to the stream, or, beside an FFN, an addition within the branch: one reached from
    there over views, scales and other such additions alone, whose other side knows nothing of other tokens.
    """
    tainted = _knows_other_tokens(mixer, facts)
    branch = next(source for source in mixer.add.all_input_nodes if source is not mixer.stream)
    found = (mixer.stream, mixer.add, branch, False)
    is_scaled, node = False, branch
    while node in tainted:
        operands = [source for source in node.all_input_nodes if source not in facts.constants]
        dirty = [source for source in operands if source in tainted]
        if ops.op_name(node) == "add" and len(operands) == 2 and len(dirty) == 1 and _same_shape(node, *operands):
            clean = next(source for source in operands if source is not dirty[0])
            found = (clean, node, dirty[0], is_scaled)
        elif ops.op_name(node) not in _LINEAR_OPS or operands != dirty or len(dirty) != 1:
            break
        is_scaled = is_scaled or ops.op_name(node) in ("mul", "div", "neg")
        node = dirty[0]
    return found


def _knows_other_tokens(mixer: Mixer, facts: GraphFacts) -> set[fx.Node]:
    tainted: set[fx.Node] = set()
    for node in mixer.nodes:
        if mixes_tokens(node, facts) or not tainted.isdisjoint(node.all_input_nodes):
            tainted.add(node)
    return tainted


def _same_shape(*nodes: fx.Node) -> bool:
    shapes = [value.shape for node in nodes if (value := ops.tensor_value(node)) is not None]
    return len(shapes) == len(nodes) and len(set(shapes)) == 1


def _adds_plainly(add: fx.Node) -> bool:
    has_scale = add.kwargs.get("alpha", 1) != 1
    return ops.op_name(add) == "add" and not has_scale and _same_shape(add, *add.all_input_nodes)


def _ffn(ffn: FfnNode, layer: int) -> ResidualBlock:
    return ResidualBlock(
        kind="ffn",
        layer=layer,
        name=ffn.name,
        stream=ffn.stream,
        before=ffn.stream,
        after=ffn.add,
        branches=(ffn.branch,) if _adds_plainly(ffn.add) else (),
    )


def _layers(
    spine: Sequence[Addition], numbers: Mapping[fx.Node, int | None], facts: GraphFacts
) -> tuple[ResidualBlock, ...]:
    """Whole decoder layers: each ends where the next begins, the last with what is read outside of it."""
    inside = [addition for addition in spine if numbers[addition.add] is not None]
    runs = [list(run) for _, run in groupby(inside, key=lambda addition: numbers[addition.add])]
    ends = [run[0].stream for run in runs[1:]] + [_output(runs[-1][-1], facts)]
    return tuple(
        ResidualBlock(
            kind="layer",
            layer=int(numbers[run[0].add] or 0),
            name=run[0].layer,
            stream=run[0].stream,
            before=run[0].stream,
            after=end,
            branches=_branches(run, end),
        )
        for run, end in zip(runs, ends, strict=True)
    )


def _output(last: Addition, facts: GraphFacts) -> fx.Node:
    """What the last layer hands on: its last addition, or what the layer makes of that (a norm, a scale)."""
    outputs = [
        node
        for node in facts.graph.nodes
        if facts.order[node] > facts.order[last.add]
        and _is_in(node, last.layer)
        and _same_channels(node, last.add)
        and any(not _is_in(user, last.layer) for user in node.users)
    ]
    return outputs[-1] if outputs else last.add


def _is_in(node: fx.Node, layer: str) -> bool:
    path = provenance.module_path(node)
    return path == layer or path.startswith(f"{layer}.")


def _branches(run: Sequence[Addition], end: fx.Node) -> tuple[fx.Node, ...]:
    """What the layer adds, one value for each addition; none where the additions do not follow each other."""
    expected = [*(addition.stream for addition in run[1:]), end]
    follows = all(
        addition.add is behind_views(node) and _adds_plainly(addition.add)
        for addition, node in zip(run, expected, strict=True)
    )
    return tuple(addition.branch for addition in run) if follows else ()


def _same_channels(node: fx.Node, other: fx.Node) -> bool:
    one, two = ops.tensor_value(node), ops.tensor_value(other)
    return one is not None and two is not None and one.numel() == two.numel() and one.shape[-1] == two.shape[-1]
