"""Let the mixers of a wide window read one stream, that before the first of them.

Before (hoisted):
    y = x + A4(x);  z = y + A5(y);  then the FFNs                     x, y, z: [..., hidden]
After:
    y = x + A4(x);  z = y + A5(x);  then the FFNs                     = x + A4(x) + A5(x)

Approximate: A5 no longer sees A4. Runs only on windows whose mixers a plan or policy makes wide, after they moved.
A mixer in the layer of the window's first FFN, which stands before that already, belongs to them.
Source: arXiv 2503.18908, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.ffn import Matches, Mixer, Window
from fxfusion.passes.find_chains import leading_mixer


class ParalleliseMixers(Pass):
    name: ClassVar[str] = "parallelise_mixers"
    exact: ClassVar[bool] = False

    def __init__(self, windows: Sequence[Window], matches: Matches) -> None:
        self.blocks = [mixers_of(window, matches) for window in windows if window.names.mixers == "wide"]

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        for first, *others in (block for block in self.blocks if len(block) > 1):
            entry = stream_of(first)
            for mixer in others:
                _reread(mixer, entry, self.name)
                changed += 1
        return PassResult(changed)

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        return [
            f"{mixer.layer or mixer.add} still reads what the mixer before it wrote"
            for block in self.blocks
            for mixer in block[1:]
            if any(stream_of(mixer) in node.all_input_nodes for node in mixer.nodes)
        ]


def mixers_of(window: Window, matches: Matches) -> list[Mixer]:
    """All mixers of a window, in order: the one before the first FFN, in its layer, and those that moved."""
    leading = leading_mixer(window.members[0], matches)
    return [*window.mixers] if leading is None else [leading, *window.mixers]


def stream_of(mixer: Mixer) -> fx.Node:
    """What it is added to, as the graph is now."""
    return next(node for node in mixer.add.all_input_nodes if node not in mixer.nodes)


def _reread(mixer: Mixer, entry: fx.Node, made_by: str) -> None:
    stream = stream_of(mixer)
    if ops.shape_of(entry) != ops.shape_of(stream):
        entry = GraphEditor(mixer.nodes[0], made_by, [mixer.layer]).method("view_as", entry, stream)
    for node in mixer.nodes:
        node.replace_input_with(stream, entry)
