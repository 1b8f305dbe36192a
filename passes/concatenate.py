"""Turn the parallel members of a group into one wide FFN.

Before:
    y1 = x + Wd1 act(Wg1 n1(x)) * (Wu1 n1(x));  y2 = y1 + Wd2 act(Wg2 n2(x)) * (Wu2 n2(x))
        Wgi, Wui: [width_i, hidden];  Wdi: [hidden, width_i]
After:
    n = norm(x) without gain
    y2 = x + Wd act(Wg n) * (Wu n)
        Wg = cat(Wg1 g1, Wg2 g2), Wu likewise: [width_1 + width_2, hidden];  Wd = cat(Wd1, Wd2, dim=1)

Exact: the sum of FFNs that read one input is one FFN with concatenated intermediate channels. Gains and
shifts of the norms (norm="fold") and scales after the down projections are folded into the weights. Groups whose
FFNs have a norm on their output are left to `concatenate_grouped`, which runs after this pass; those of form
"members" stay as they are.
Source: arXiv 2503.18908, theorem 3.1.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.build_wide import WideBuilder
from fxfusion.passes.ffn import Group
from fxfusion.passes.pack_weights import PACK_TAG, WeightPacker

GROUP_TAG = "fxfusion_group"
"""Marks the addition that ends a fused group with the group's index."""
STANDS_FOR = "fxfusion_stands_for"
"""Marks a node with the name of the one whose place it took: they compute the same."""


class Concatenate(Pass):
    name: ClassVar[str] = "concatenate"
    exact: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)

    def run(self, graph: fx.Graph) -> PassResult:
        _forget_tags(graph)
        fused: dict[fx.Node, fx.Node] = {}  # where one group ends, its neighbour may begin
        wide = self._wide()
        for index, group in wide:
            stream = group.members[0].stream
            fused[group.members[-1].add] = _fuse(group, index, fused.get(stream, stream), self.name)
        erase_members(graph, [group for _, group in wide])
        return PassResult(len(wide))

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        return left_behind(graph, [group for _, group in self._wide()])

    def _wide(self) -> list[tuple[int, Group]]:
        pairs = enumerate(self.groups)
        return [(index, group) for index, group in pairs if group.form != "members" and not group.is_grouped]


def _fuse(group: Group, index: int, stream: fx.Node, made_by: str) -> fx.Node:
    """Build the wide FFN on `stream`, the group's input as it is now; returns the addition that ends it."""
    last = group.members[-1]
    editor = GraphEditor(last.add, made_by, [member.name for member in group.members])
    packer = WeightPacker(editor, group, index)
    middle = WideBuilder(editor, packer, group, stream).middle()
    down = editor.call(F.linear, middle, packer.down_weight(), packer.down_bias())
    branch = like_branch(editor, down, stream, last.branch)
    total = editor.call(operator.add, stream, branch)
    end_group(group, index, total)
    return total


def end_group(group: Group, index: int, total: fx.Node) -> None:
    """Let everybody read `total` instead of the last member's addition."""
    last = group.members[-1]
    total.meta[GROUP_TAG] = index
    total.meta[STANDS_FOR] = last.add.name
    last.add.replace_all_uses_with(total)
    last.add.graph.erase_node(last.add)


def _forget_tags(graph: fx.Graph) -> None:
    """Take the marks of an earlier fusion off: a graph may be fused again, by another plan, and its numbers would be
    taken for ours."""
    for node in graph.nodes:
        for tag in (GROUP_TAG, PACK_TAG, STANDS_FOR):
            node.meta.pop(tag, None)


def erase_members(graph: fx.Graph, groups: Sequence[Group]) -> None:
    """Erase what nobody reads any more. In-place nodes too, which general dead-code removal must keep: the
    matcher made sure that those of a branch write what the branch itself made.
    """
    own = {node for group in groups for member in group.members for node in (*member.nodes, member.add)}
    for node in reversed(list(graph.nodes)):
        if node in own and not node.users:
            graph.erase_node(node)


def left_behind(graph: fx.Graph, groups: Sequence[Group]) -> list[str]:
    """Members of which something is still there."""
    alive = set(graph.nodes)
    return [
        f"{member.name} is still computed by itself"
        for group in groups
        for member in group.members
        if alive & {member.down.node, *(linear.node for linear in member.projections)}
    ]


def like_branch(editor: GraphEditor, value: fx.Node, stream: fx.Node, branch: fx.Node) -> fx.Node:
    """The value in the stream's shape and the branch's dtype."""
    dtype = ops.tensor_of(branch).dtype
    if ops.tensor_of(value).dtype != dtype:
        value = editor.method("to", value, dtype)
    if ops.shape_of(value) != ops.shape_of(stream):
        value = editor.method("view_as", value, stream)
    return value
