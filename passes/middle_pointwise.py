"""The middle of an FFN that treats each intermediate channel by itself: any activation, gated or not.

Matches (no edit):
    h = act(g) * u                    g, u, h: [..., width]; constants of it: one number, or one per channel
Builds (searches nothing):
    h = act(g) * u                    g, u, h: [..., sum of widths], member after member; constants side by side

Exact: what is pointwise on the channels of each member is pointwise on the channels of all. Views in it regroup tokens
only and are left out.
Source: arXiv 2503.18908, theorem 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.build_wide import WideBuilder
from fxfusion.passes.ffn import FfnNode, Inputs, Middle


class PointwiseMiddle(Middle):
    def misfit(self, nodes: Sequence[fx.Node], inputs: Inputs, before: Refused | None) -> Refused | None:
        try:
            check_token_wise(nodes, inputs, pointwise_only=True)
        except Refused as refused:
            return refused
        return None

    def misfit_of(self, members: Sequence[FfnNode]) -> Refused | None:
        indices = range(len(members[0].middle_constants))
        return next((misfit for index in indices if (misfit := _misfit_of_constant(members, index))), None)

    def joined(self, wide: WideBuilder) -> fx.Node:
        template, stand_in = wide.template, wide.pieces()
        for index, constant in enumerate(template.middle_constants):
            stand_in[constant] = _constant(wide, index)

        def shown(node: fx.Node) -> fx.Node:
            while node in template.aliases and node not in stand_in:
                node = template.aliases[node]
            return stand_in.get(node, node)

        for node in template.middle:
            replace = {source: shown(source) for source in node.all_input_nodes}
            stand_in[node] = wide.editor.clone((node,), replace)[node]
        return shown(template.down.input)

    def apart(self, wide: WideBuilder) -> list[fx.Node]:
        whole = self.joined(wide)
        return [wide.editor.channels(whole, start, start + member.width) for member, start in wide.starts()]


def _misfit_of_constant(members: Sequence[FfnNode], index: int) -> Refused | None:
    """A constant of the activation is one number or size that all share, or becomes one value per channel."""
    shared = len({member.middle_constants[index] for member in members}) == 1
    for member in members:
        constant = member.middle_constants[index]
        value = ops.tensor_value(constant)
        if shared and (value is None or value.numel() == 1):
            continue
        if value is None or value.numel() not in (1, member.width):
            words = f"{constant} is not one number or one per intermediate channel"
            return Refused(RefusalCode.NOT_POINTWISE, words)
        if value.dim() == 0 and value.dtype != ops.tensor_of(member.down.input).dtype:
            # A vector of them would take part in type promotion, the number does not.
            words = f"{constant} is a {value.dtype} number in a middle of another dtype"
            return Refused(RefusalCode.DIFFERENT_DTYPE, words)
    return None


def _constant(wide: WideBuilder, index: int) -> fx.Node:
    """A constant of the activation: itself where it is one shared number, else one value per wide channel."""
    members = wide.group.members
    nodes = [member.middle_constants[index] for member in members]
    example = ops.tensor_value(nodes[0])
    if all(node is nodes[0] for node in nodes) and (example is None or example.numel() == 1):
        return nodes[0]
    return wide.joined([wide.vector(node, member.width) for node, member in zip(nodes, members, strict=True)])
