"""Let the mixers of a window of layers go before its FFNs, which then stand in one chain.

Before:
    y = x + F4(x);  z = y + A5(y);  z1 = z + F5(z)                    x, y, z, z1: [..., hidden]
After:
    z = x + A5(x);  y = z + F4(z);  z1 = y + F5(y)                    a chain of two, for parallelise and concatenate

Approximate: A5 no longer sees F4. Runs only on windows that a plan or policy names. The mixers stay where they
stand in the graph, cache writes with them, and so keep their order; it is the FFNs, which have no effects, that
go behind the last of them.
Source: arXiv 2503.18908, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.ffn import FfnNode, Mixer, Window
from fxfusion.passes.match_pieces import views_behind


class HoistMixers(Pass):
    name: ClassVar[str] = "hoist_mixers"
    exact: ClassVar[bool] = False

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = tuple(windows)

    def run(self, graph: fx.Graph) -> PassResult:
        order = {node: place for place, node in enumerate(graph.nodes)}
        for window in self.windows:
            if window.mixers:
                last = window.mixers[-1]
                passed = [ffn for ffn in window.members if order[ffn.add] < order[last.add]]
                _free_shapes(passed, window)
                _move_behind(last.add, passed)
                _rewire(window, self.name)
        return PassResult(sum(len(window.mixers) for window in self.windows))

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        order = {node: place for place, node in enumerate(graph.nodes)}
        return [
            f"{mixer.layer or mixer.add} still stands behind {window.members[0].name}"
            for window in self.windows
            for mixer in window.mixers
            if order[mixer.add] > order[window.members[0].add]
        ]


def _free_shapes(ffns: Sequence[FfnNode], window: Window) -> None:
    """Sizes of the stream that were read behind an FFN are read before it: they are the same there."""
    for ffn in ffns:
        views = [user for user in ffn.add.users if ffn.add in views_behind(user)]
        for value in (ffn.add, *views):
            for user in list(value.users):
                if ops.is_shape_value(user) and user.op != "output":
                    user.replace_input_with(value, _same_shape(value, window.entry))


def _rewire(window: Window, made_by: str) -> None:
    """Each block reads what the one before it, in the new order, wrote, in the shape that it had read before."""
    stream: fx.Node | None = None
    blocks: list[FfnNode | Mixer] = [*window.mixers, *window.members]
    for block in blocks:
        like = _same_shape(block.stream, window.entry)
        if stream is None:
            stream = like
        elif ops.shape_of(stream) != ops.shape_of(like):
            names = [member.name for member in window.members]
            stream = GraphEditor(block.nodes[0], made_by, names).method("view_as", stream, like)
        for node in (*block.nodes, block.add):
            node.replace_input_with(block.stream, stream)
        stream = block.add


def _same_shape(value: fx.Node, entry: Sequence[fx.Node]) -> fx.Node:
    return next(node for node in entry if ops.shape_of(node) == ops.shape_of(value))


def _move_behind(anchor: fx.Node, ffns: Sequence[FfnNode]) -> None:
    for ffn in ffns:
        for node in (*ffn.nodes, ffn.add):
            anchor.append(node)
            anchor = node
