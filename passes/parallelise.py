"""Let all members of a group read the group's input.

Before:
    y1 = x + F1(n1(x));  y2 = y1 + F2(n2(y1))                     x, y1, y2: [..., hidden]
After:
    y1 = x + F1(n1(x));  y2 = y1 + F2(n2(x))                      norm="fold": each with its own norm
    y1 = x + F1(n2(x));  y2 = y1 + F2(n2(x))                      norm="last": the last member's norm

Approximate: x + F1(x) + F2(x) instead of x + F1(x) + F2(x + F1(x)). Runs only on groups that a policy
or plan chose; what it costs in quality is measured, never assumed.
Source: arXiv 2503.18908, equation 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.ffn import FfnNode, Group


class Parallelise(Pass):
    name: ClassVar[str] = "parallelise"
    exact: ClassVar[bool] = False

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)

    def run(self, graph: fx.Graph) -> PassResult:
        for group in self.groups:
            stream = group.members[0].stream
            for member in group.members[1:]:
                _reread(member.nodes, member.stream, stream)
            if group.norm == "last":
                _share_last_norm(group, stream)
        return PassResult(sum(len(group.members) - 1 for group in self.groups))


def _reread(nodes: Sequence[fx.Node], old: fx.Node, new: fx.Node) -> None:
    for node in nodes:
        node.replace_input_with(old, new)


def _share_last_norm(group: Group, stream: fx.Node) -> None:
    """Move the last member's norm before the first member, and let every member read it."""
    last = group.members[-1]
    first = group.members[0].nodes[0]
    for node in last.prologue:
        first.prepend(node)
    normed = last.normed if last.prologue else stream
    for member in group.members[:-1]:
        _reread(_after_norm(member), member.normed if member.prologue else stream, normed)


def _after_norm(member: FfnNode) -> list[fx.Node]:
    prologue = set(member.prologue)
    return [node for node in member.nodes if node not in prologue]
