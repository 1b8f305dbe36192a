"""The kinds of FFN, in the order in which they are tried. A kind is a middle and an end, each one file.

Matches (no edit):
    h = middle(g, u)                  `middle_pointwise`, `middle_normed`
    b = end(h Wd^T + bd)              `end_folded`, `end_normed`
Gated, plain and packed projections are no kinds: any number of pieces of any number of projections is read alike (see
`match_pieces`). A new kind is its file, its test, and a place here.
Source: arXiv 2503.18908, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph.dataflow import GraphFacts, Slice
from fxfusion.passes.end_folded import match_folded
from fxfusion.passes.end_normed import match_normed
from fxfusion.passes.ffn import End, Inputs, Linear, Middle
from fxfusion.passes.middle_normed import NormedMiddle
from fxfusion.passes.middle_pointwise import PointwiseMiddle

MIDDLES: tuple[Middle, ...] = (PointwiseMiddle(), NormedMiddle())
ENDS = (match_folded, match_normed)


def match_middle(nodes: Sequence[fx.Node], inputs: Inputs) -> Middle:
    """How the nodes between the projections and `down` treat channels. Raises `Refused`."""
    said: Refused | None = None
    for kind in MIDDLES:
        said = kind.misfit(nodes, inputs, said)
        if said is None:
            return kind
    assert said is not None
    raise said


def match_end(branch: fx.Node, linears: Sequence[Linear], found: Slice, facts: GraphFacts) -> tuple[Linear, End]:
    """The branch's last linear layer and what is done to its result. Raises `Refused`."""
    said = Refused(RefusalCode.LINEAR_COUNT, "the branch has no linear layer with constant weights", branch)
    for match in ENDS if linears else ():
        result = match(branch, linears, found, facts, said)
        if not isinstance(result, Refused):
            return result
        said = result
    raise said
