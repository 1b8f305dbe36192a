"""Recognise one residual feed-forward node by its dataflow.

Matches (no edit):
    n = norm(x)                       prologue: token-wise, whatever its spelling
    g, u = n Wg^T + bg, n Wu^T + bu   projections: linear layers that read n (one, two or packed)
    h = act(g) * u                    middle: one of the kinds of `kinds`, as is the end
    b = end(h Wd^T + bd)              down, and what stands behind it
    y = x + b                         x, y: [..., hidden]; h: [..., width]
Everything the branch computes is read inside it only. A branch that does not fit is refused with a
code; nothing is guessed from names of modules.
Source: arXiv 2503.18908, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops, provenance
from fxfusion.graph.dataflow import GraphFacts, Slice
from fxfusion.graph.isomorphism import Entry, Structure, describe_region
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.ffn import End, FfnNode, Linear, Middle
from fxfusion.passes.kinds import match_end, match_middle
from fxfusion.passes.match_linear import match_linear
from fxfusion.passes.match_pieces import VIEWS, Cuts, check_axes, keeps_channels, match_pieces


@dataclass
class _Regions:
    """The branch, cut into regions (see `FfnNode`)."""

    prologue: tuple[fx.Node, ...]
    normed: fx.Node
    projections: tuple[Linear, ...]
    cuts: Cuts
    middle: tuple[fx.Node, ...]
    down: Linear
    end: End


class FfnMatcher:
    """Matches branches of one graph; remembers which structures it has already proved token-wise."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self._proved: dict[tuple[Structure, str], Refused | Middle] = {}

    def match(self, stream: fx.Node, add: fx.Node, branch: fx.Node, found: Slice) -> FfnNode:
        """The FFN node `add = stream + branch`. Raises `Refused`."""
        regions = self._cut(stream, branch, found)
        _check_widths(regions, stream)
        prologue_constants = self.facts.constants_of(regions.prologue)
        middle_constants = self.facts.constants_of(regions.middle)
        end = regions.end.structure(regions.down.node)
        places = {stream: "x"} | {node: f"c{index}" for index, node in enumerate(prologue_constants)}
        prologue = describe_region(regions.prologue, places)
        structure = prologue + _middle_structure(regions, middle_constants, branch) + end
        kind = self._prove_token_wise(regions, stream, structure)
        regions.end.check_axes(regions.down.node, stream)
        if kind.is_apart:
            structure = prologue + _middle_structure(regions, middle_constants, branch, own_width=True) + end
            check_axes((*regions.cuts.pieces, *regions.cuts.aliases), regions.normed, RefusalCode.NOT_POINTWISE)
        linears = [linear.node for linear in (*regions.projections, regions.down)]
        return FfnNode(
            stream=stream,
            add=add,
            branch=branch,
            nodes=found.nodes,
            prologue=regions.prologue,
            prologue_constants=prologue_constants,
            normed=regions.normed,
            projections=regions.projections,
            pieces=tuple(regions.cuts.pieces.values()),
            aliases=dict(regions.cuts.aliases),
            middle=regions.middle,
            middle_constants=middle_constants,
            down=regions.down,
            middle_kind=kind,
            end=regions.end,
            prologue_structure=prologue,
            structure=structure,
            name=provenance.common_path(linears) or str(add),
            layer=provenance.owning_layer(found.nodes, add),
            source=provenance.source_line(regions.down.node) or provenance.source_line(add),
        )

    def _cut(self, stream: fx.Node, branch: fx.Node, found: Slice) -> _Regions:
        linears = [linear for node in found.nodes if (linear := match_linear(node, self.facts)) is not None]
        down, end = match_end(branch, linears, found, self.facts)
        projections = self._projections(linears, down, stream)
        normed = _normed(projections, stream)
        prologue = self.facts.slice_between(normed, stream).nodes if normed is not stream else ()
        region = self._after(projections, down, found, prologue)
        cuts = match_pieces(projections, region)
        middle = tuple(n for n in region if not (n in cuts.aliases or n in cuts.holders or n in cuts.pieces))
        used = {cuts.resolve(source) for node in (*middle, down.node) for source in node.all_input_nodes}
        cuts.pieces = {node: piece for node, piece in cuts.pieces.items() if node in used}
        self._check_sources(middle, cuts)
        return _Regions(prologue, normed, projections, cuts, middle, down, end)

    def _projections(self, linears: Sequence[Linear], down: Linear, stream: fx.Node) -> tuple[Linear, ...]:
        projections = tuple(linear for linear in linears if linear is not down)
        if not projections:
            raise Refused(
                RefusalCode.LINEAR_COUNT, "the branch has one linear layer; a feed-forward has two in a row", down.node
            )
        outputs = {linear.node for linear in linears}
        for linear in projections:
            if outputs & set(self.facts.slice_between(linear.input, stream).nodes):
                raise Refused(
                    RefusalCode.LINEAR_COUNT, "the branch has more than two linear layers in a row", linear.node
                )
        return projections

    def _after(
        self, projections: Sequence[Linear], down: Linear, found: Slice, prologue: Iterable[fx.Node]
    ) -> list[fx.Node]:
        """The nodes that compute the input of the down projection from the projections' outputs."""
        outputs = {linear.node for linear in projections}
        behind_down = set(self.facts.slice_between(down.input, found.stop).nodes)
        after = set(outputs)
        region = []
        for node in found.nodes:
            if after & set(node.all_input_nodes):
                after.add(node)
                if node in behind_down and not ops.is_shape_value(node):
                    region.append(node)
        assert after.isdisjoint(prologue), "a linear layer behind another was refused with linear_count"
        return region

    def _check_sources(self, middle: Sequence[fx.Node], cuts: Cuts) -> None:
        known = set(middle) | set(cuts.pieces)
        for node in middle:
            for source in node.all_input_nodes:
                if source in self.facts.constants or ops.is_shape_value(source):
                    continue
                if cuts.resolve(source) not in known:
                    message = f"{ops.op_name(node)} reads {source}, which no projection made"
                    raise Refused(RefusalCode.STRUCTURE, message, node)

    def _prove_token_wise(self, regions: _Regions, stream: fx.Node, structure: Structure) -> Middle:
        """The kind of the middle. Raises `Refused` where the branch is not token-wise."""
        key = (structure, str(getattr(ops.tensor_value(stream), "shape", "")))
        if key not in self._proved:
            try:
                self._proved[key] = self._check_token_wise(regions, stream)
            except Refused as refused:
                self._proved[key] = refused
        found = self._proved[key]
        if isinstance(found, Refused):
            raise found
        return found

    def _check_token_wise(self, regions: _Regions, stream: fx.Node) -> Middle:
        constants = {node: False for node in self.facts.constants_of(regions.prologue)}
        check_token_wise(regions.prologue, {stream: True} | constants)
        cuts = regions.cuts
        inputs = dict.fromkeys(cuts.pieces, True) | dict.fromkeys(self.facts.constants_of(regions.middle), False)
        inputs |= {view: True for view in cuts.aliases if cuts.resolve(view) in cuts.pieces}
        views = [view for view in cuts.aliases if cuts.resolve(view) in regions.middle]
        kind = match_middle(sorted((*regions.middle, *views), key=self.facts.order.__getitem__), inputs)
        regions.end.check(regions.down.node)
        return kind


def _normed(projections: Sequence[Linear], stream: fx.Node) -> fx.Node:
    """The one value that every projection reads, views looked through."""
    inputs = []
    for linear in projections:
        node = linear.input
        while node is not stream and ops.op_name(node) in VIEWS and keeps_channels(node, node.all_input_nodes[0]):
            node = node.all_input_nodes[0]
        inputs.append(node)
    if len(set(inputs)) > 1:
        raise Refused(RefusalCode.STRUCTURE, "the projections of the branch read different values", inputs[-1])
    return inputs[0]


def _check_widths(regions: _Regions, stream: fx.Node) -> None:
    width, hidden = regions.down.in_features, regions.down.out_features
    for piece in regions.cuts.pieces.values():
        if piece.width != width:
            message = f"the middle reads {piece.width} channels of a projection, the down projection {width}"
            raise Refused(RefusalCode.STRUCTURE, message, piece.node)
    example = ops.tensor_value(stream)
    if example is None or example.shape[-1] != hidden:
        # One channel that the tail spreads over the stream. So the tail's vectors are `hidden` long, or 1.
        raise Refused(RefusalCode.BROADCAST, f"the branch is {hidden} wide, the stream is not", regions.down.node)


def _middle_structure(
    regions: _Regions, constants: Sequence[fx.Node], branch: fx.Node, *, own_width: bool = False
) -> Structure:
    """What must be alike in members of a group, widths left out; with `own_width`, also those that the code names."""
    cuts, width = regions.cuts, regions.down.in_features
    places = {node: f"m{index}" for index, node in enumerate(constants)}
    entries = []
    for index, piece in enumerate(cuts.pieces.values()):
        channels = f"{piece.start // width}*width" if piece.step == 1 else f"{piece.start}::{piece.step}"
        entries.append(Entry("piece", f"{piece.projection}:{channels}", ops.dtype_name(piece.node), ""))
        places[piece.node] = f"p{index}"
    computed = {node: f"%{index}" for index, node in enumerate(regions.middle)}
    for view in cuts.aliases:
        shown = cuts.resolve(view)
        places[view] = places.get(shown, computed.get(shown, str(view)))
    entries += describe_region(regions.middle, places, {width: "width"} if own_width else {})
    end = cuts.resolve(regions.down.input)
    entries.append(Entry("down", "", ops.dtype_name(regions.down.node), computed.get(end, places.get(end, str(end)))))
    entries.append(Entry("branch", "", ops.dtype_name(branch), ""))
    return tuple(entries)
