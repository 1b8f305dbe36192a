"""Turn the parallel members of a group into one wide FFN.

Before:
    y1 = x + Wd1 act(Wg1 n1(x)) * (Wu1 n1(x));  y2 = y1 + Wd2 act(Wg2 n2(x)) * (Wu2 n2(x))
        Wgi, Wui: [width_i, hidden];  Wdi: [hidden, width_i]
After:
    n = norm(x) without gain
    y2 = x + Wd act(Wg n) * (Wu n)
        Wg = cat(Wg1 g1, Wg2 g2), Wu likewise: [width_1 + width_2, hidden];  Wd = cat(Wd1, Wd2, dim=1)

Exact: the sum of FFNs that read one input is one FFN with concatenated intermediate channels. Gains and
shifts of the norms (norm="fold") and scales after the down projections are folded into the weights.
Source: arXiv 2503.18908, theorem 3.1.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.ffn import FfnNode, Group
from fxfusion.passes.pack_weights import PACK_TAG, WeightPacker

GROUP_TAG = "fxfusion_group"
"""Marks the addition that ends a fused group with the group's index."""


class Concatenate(Pass):
    name: ClassVar[str] = "concatenate"
    exact: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)

    def run(self, graph: fx.Graph) -> PassResult:
        _forget_tags(graph)
        for node in graph.nodes:  # numbers of an earlier run would be taken for ours
            node.meta.pop(GROUP_TAG, None)
        fused: dict[fx.Node, fx.Node] = {}  # where one group ends, its neighbour may begin
        for index, group in enumerate(self.groups):
            stream = group.members[0].stream
            fused[group.members[-1].add] = _fuse(group, index, fused.get(stream, stream), self.name)
        _erase_members(graph, self.groups)
        return PassResult(len(self.groups))

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        alive = set(graph.nodes)
        return [
            f"{member.name} is still computed by itself"
            for group in self.groups
            for member in group.members
            if alive & {member.down.node, *(linear.node for linear in member.projections)}
        ]


def _fuse(group: Group, index: int, stream: fx.Node, made_by: str) -> fx.Node:
    """Build the wide FFN on `stream`, the group's input as it is now; returns the addition that ends it."""
    last = group.members[-1]
    template = last if group.norm == "last" else group.members[0]
    editor = GraphEditor(last.add, made_by, [member.name for member in group.members])
    packer = WeightPacker(editor, group, index)
    normed = _normed(editor, group, template, stream)
    pieces = _project(editor, packer, template, normed)
    middle = _middle(editor, packer, template, pieces)
    down = editor.call(F.linear, middle, packer.down_weight(), packer.down_bias())
    branch = _like(editor, down, stream, last.branch)
    total = editor.call(operator.add, stream, branch)
    total.meta[GROUP_TAG] = index
    last.add.replace_all_uses_with(total)
    last.add.graph.erase_node(last.add)
    return total


def _forget_tags(graph: fx.Graph) -> None:
    """Take the marks of an earlier fusion off (a graph may be fused again, by another plan)."""
    for node in graph.nodes:
        node.meta.pop(GROUP_TAG, None)
        node.meta.pop(PACK_TAG, None)


def _erase_members(graph: fx.Graph, groups: Sequence[Group]) -> None:
    """Erase what nobody reads any more. In-place nodes too, which general dead-code removal must keep: the
    matcher made sure that those of a branch write what the branch itself made.
    """
    own = {node for group in groups for member in group.members for node in (*member.nodes, member.add)}
    for node in reversed(list(graph.nodes)):
        if node in own and not node.users:
            graph.erase_node(node)


def _normed(editor: GraphEditor, group: Group, template: FfnNode, stream: fx.Node) -> fx.Node:
    """The template's norm over the group's input, with folded gains set to one and shifts to zero."""
    if not template.prologue:
        return stream
    replace = {template.stream: stream}
    for constant, role in zip(template.prologue_constants, group.roles, strict=True):
        if role != "fixed":
            example = ops.tensor_value(constant)
            assert example is not None
            fill = torch.ones if role == "gain" else torch.zeros
            replace[constant] = editor.call(fill, tuple(example.shape), dtype=example.dtype, device=example.device)
    return editor.clone(template.prologue, replace)[template.normed]


def _project(editor: GraphEditor, packer: WeightPacker, template: FfnNode, normed: fx.Node) -> dict[fx.Node, fx.Node]:
    """One wide linear layer per projection, cut into one wide piece per piece of the template."""
    pieces: dict[fx.Node, fx.Node] = {}
    for number, _ in enumerate(template.projections):
        own = [piece for piece in template.pieces if piece.projection == number]
        wide = editor.call(F.linear, normed, packer.projection_weight(number), packer.projection_bias(number))
        for place, piece in enumerate(own):
            start = place * packer.group.width
            pieces[piece.node] = wide if len(own) == 1 else editor.channels(wide, start, start + packer.group.width)
    return pieces


def _middle(editor: GraphEditor, packer: WeightPacker, template: FfnNode, pieces: dict[fx.Node, fx.Node]) -> fx.Node:
    """The template's activation on the wide pieces. Views in it regroup tokens only and are left out."""
    stand_in = dict(pieces)
    for index, constant in enumerate(template.middle_constants):
        stand_in[constant] = packer.middle_constant(index)

    def shown(node: fx.Node) -> fx.Node:
        while node in template.aliases and node not in stand_in:
            node = template.aliases[node]
        return stand_in.get(node, node)

    for node in template.middle:
        replace = {source: shown(source) for source in node.all_input_nodes}
        stand_in[node] = editor.clone((node,), replace)[node]
    return shown(template.down.input)


def _like(editor: GraphEditor, value: fx.Node, stream: fx.Node, branch: fx.Node) -> fx.Node:
    """The value in the stream's shape and the branch's dtype."""
    made, wanted, kind = (ops.tensor_value(node) for node in (value, stream, branch))
    assert made is not None and wanted is not None and kind is not None
    if made.dtype != kind.dtype:
        value = editor.method("to", value, kind.dtype)
    if [str(size) for size in made.shape] != [str(size) for size in wanted.shape]:
        value = editor.method("view_as", value, stream)
    return value
