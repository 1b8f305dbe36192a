"""The middle of an FFN with something in it that is computed over all channels of one member: an inner norm.

Matches (no edit):
    h = N(act(g) * u)                 g, u, h: [..., width]; N: token-wise, whatever its spelling
Builds (searches nothing):
    h = cat_i(N_i(act(g_i) * u_i))    g_i, u_i: [..., width_i]: the member's channels of wide g and u

Exact: the norm over the channels of all members is another one, so each member of a group keeps its own.
Source: norms inside of the FFN, as in arXiv 2110.09456, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.build_wide import WideBuilder, clone_region, regrouped
from fxfusion.passes.ffn import FfnNode, Inputs, Middle
from fxfusion.passes.match_pieces import is_flat


class NormedMiddle(Middle):
    no_module: ClassVar[str] = (
        "a norm stands inside of the FFN, and one over the channels of all members is another norm"
    )
    is_apart: ClassVar[bool] = True

    def misfit(self, nodes: Sequence[fx.Node], inputs: Inputs, before: Refused | None) -> Refused | None:
        """What the stricter check said holds, unless something is computed over channels."""
        if before is None or before.code is not RefusalCode.NOT_POINTWISE:
            return before
        try:
            return None if check_token_wise(nodes, inputs) else before
        except Refused:
            return before

    def joined(self, wide: WideBuilder) -> fx.Node:
        middles = self.apart(wide)
        axes = next(filter(is_flat, middles), middles[0])  # one member may be computed on `[tokens, channels]`
        return wide.editor.call(torch.cat, [regrouped(wide.editor, one, axes, axes) for one in middles], -1)

    def apart(self, wide: WideBuilder) -> list[fx.Node]:
        pieces = wide.pieces()
        return [_own(wide, member, start, pieces) for member, start in wide.starts()]


def _own(wide: WideBuilder, member: FfnNode, start: int, pieces: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """One member's activation, with its own constants, on its channels of the wide pieces."""
    stand_in: dict[fx.Node, fx.Node] = {}
    for own, shared in zip(member.pieces, wide.template.pieces, strict=True):
        like = wide.editor.channels(pieces[shared.node], start, start + member.width)
        stand_in[own.node] = regrouped(wide.editor, like, own.node, like)
    for node in member.nodes:
        is_view = node in member.aliases or ops.is_shape_value(node)
        shows = is_view and any(source in stand_in for source in node.all_input_nodes)
        if node not in stand_in and (node in member.middle or shows):
            clone_region(wide.editor, [node], stand_in, like)
    return stand_in[member.down.input]
