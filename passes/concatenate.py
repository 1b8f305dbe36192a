"""Turn the parallel members of a group into one wide FFN.

Before:
    y1 = x + Wd1 act(Wg1 n1(x)) * (Wu1 n1(x));  y2 = y1 + Wd2 act(Wg2 n2(x)) * (Wu2 n2(x))
        Wgi, Wui: [width_i, hidden];  Wdi: [hidden, width_i]
After:
    n = norm(x) without gain;  h = act(Wg n) * (Wu n)                 h: [..., width_1 + width_2]
    y2 = x + Wd h
        Wg = cat(Wg1 g1, Wg2 g2), Wu likewise: [width_1 + width_2, hidden];  Wd = cat(Wd1, Wd2, dim=1)

Exact: the sum of FFNs that read one input is one FFN with concatenated intermediate channels. Gains and shifts of the
norms (norm="fold") are folded into the weights. What differs from kind to kind, `kinds` has. Weights of prepacked
groups are read in oneDNN's layout. Groups of form "members" stay as they are.
Source: arXiv 2503.18908, theorem 3.1.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.build_wide import PACK_TAG, WideBuilder
from fxfusion.passes.ffn import FfnNode, Group

STANDS_FOR = "fxfusion_stands_for"
"""Marks a node with the name of the one whose place it took: they compute the same."""


class Concatenate(Pass):
    name: ClassVar[str] = "concatenate"
    exact: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = {index: group for index, group in enumerate(groups) if group.form != "members"}

    def run(self, graph: fx.Graph) -> PassResult:
        for node in graph.nodes:  # a graph may be fused again, by another plan: its marks would be taken for ours
            for tag in (PACK_TAG, STANDS_FOR):
                node.meta.pop(tag, None)
        fused: dict[fx.Node, fx.Node] = {}  # where one group ends, its neighbour may begin
        for index, group in self.groups.items():
            stream = group.members[0].stream
            fused[group.members[-1].add] = _fuse(group, index, fused.get(stream, stream), self.name)
        self._erase_members(graph)
        return PassResult(len(self.groups))

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        alive = set(graph.nodes)
        return [
            f"{member.name} is still computed by itself"
            for member in self._members()
            if alive & {member.down.node, *(linear.node for linear in member.projections)}
        ]

    def _members(self) -> list[FfnNode]:
        return [member for group in self.groups.values() for member in group.members]

    def _erase_members(self, graph: fx.Graph) -> None:
        """Erase what nobody reads any more. In-place nodes too, which general dead-code removal must keep: the
        matcher made sure that those of a branch write what the branch itself made.
        """
        own = {node for member in self._members() for node in (*member.nodes, member.add)}
        for node in reversed(list(graph.nodes)):
            if node in own and not node.users:
                graph.erase_node(node)


def _fuse(group: Group, index: int, stream: fx.Node, made_by: str) -> fx.Node:
    """Build the group on `stream`, its input as it is now; returns the addition that ends it."""
    last = group.members[-1]
    editor = GraphEditor(last.add, made_by, [member.name for member in group.members])
    total = stream
    for value, branch in group.end.branches(WideBuilder(editor, group, index, stream)):
        total = editor.call(operator.add, total, _like_branch(editor, value, stream, branch))
    total.meta[STANDS_FOR] = last.add.name
    last.add.replace_all_uses_with(total)
    last.add.graph.erase_node(last.add)
    return total


def _like_branch(editor: GraphEditor, value: fx.Node, stream: fx.Node, branch: fx.Node) -> fx.Node:
    """The value in the stream's shape and the branch's dtype."""
    dtype = ops.tensor_of(branch).dtype
    if ops.tensor_of(value).dtype != dtype:
        value = editor.method("to", value, dtype)
    return value if ops.shape_of(value) == ops.shape_of(stream) else editor.method("view_as", value, stream)
