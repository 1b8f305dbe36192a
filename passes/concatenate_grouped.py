"""Fuse parallel members that each have a norm on their output: wide up to the activation, then each its own way.

Before:
    y1 = x + N1(Wd1 h1(x));  y2 = y1 + N2(Wd2 h2(x))              hi = act(Wgi ni(x)) * (Wui ni(x))
        Wdi: [hidden, width_i];  Ni: a norm with its own gain, token-wise, whatever its spelling
After:
    h = act(Wg n(x)) * (Wu n(x))                                  [..., width_1 + width_2]
    y1 = x + N1(Wd1 h[..., :width_1]);  y2 = y1 + N2(Wd2 h[..., width_1:])

Exact: the same sum in the same order. The norm of a sum is not the sum of norms, so nothing behind the activation
can be joined but the addition. Gains and shifts of the norms before the projections fold as in `concatenate`; with
norm="last" all members read the last member's norm before the projections, and keep their own on the output.
The output norms read the members' own weights, and so do the down projections unless oneDNN packs them; groups of form
"members" stay as they are.
Source: issue 7; arXiv 2503.18908, theorem 3.1, for the part before the down projections.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import fx

from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.build_wide import WideBuilder, clone_region, regrouped
from fxfusion.passes.concatenate import GROUP_TAG, end_group, erase_members, left_behind, like_branch
from fxfusion.passes.ffn import FfnNode, Group
from fxfusion.passes.pack_weights import WeightPacker


class ConcatenateGrouped(Pass):
    """Runs after `Concatenate`, on the same groups."""

    name: ClassVar[str] = "concatenate_grouped"
    exact: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group]) -> None:
        self.all = tuple(groups)
        self.groups = [group for group in groups if group.is_grouped and group.form != "members"]

    def run(self, graph: fx.Graph) -> PassResult:
        ends = {node.meta[GROUP_TAG]: node for node in graph.nodes if GROUP_TAG in node.meta}
        fused = {self.all[index].members[-1].add: node for index, node in ends.items()}
        for index, group in enumerate(self.all):
            if group in self.groups:
                stream = group.members[0].stream
                fused[group.members[-1].add] = _fuse(group, index, fused.get(stream, stream), self.name)
        erase_members(graph, self.groups)
        return PassResult(len(self.groups))

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        return left_behind(graph, self.groups)


def _fuse(group: Group, index: int, stream: fx.Node, made_by: str) -> fx.Node:
    """Build the group on `stream`, its input as it is now; returns the addition that ends it."""
    editor = GraphEditor(group.members[-1].add, made_by, [member.name for member in group.members])
    packer = WeightPacker(editor, group, index)
    total = stream
    for member, middle in zip(group.members, WideBuilder(editor, packer, group, stream).middles(), strict=True):
        weight, bias = packer.own_down(member)
        branch = _output(editor, member, editor.call(F.linear, middle, weight, bias), stream)
        total = editor.call(operator.add, total, like_branch(editor, branch, stream, member.branch))
    end_group(group, index, total)
    return total


def _output(editor: GraphEditor, member: FfnNode, down: fx.Node, stream: fx.Node) -> fx.Node:
    """The member's own norm, and what else stands behind its down projection."""
    values = {member.down.node: regrouped(editor, down, member.down.node, stream)}
    clone_region(editor, member.output, values, stream)
    return values[member.branch]
