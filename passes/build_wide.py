"""The part of a fused group that all members share: one norm, wide projections, the activation.

Before:
    ni = norm(x) * gi;  hi = act(Wgi ni) * (Wui ni)               hi: [..., width_i]
After:
    n = norm(x);  h = act(Wg n) * (Wu n)                          h: [..., sum of widths], member after member
        Wg = cat_i(Wgi gi), Wu likewise
    where something is computed over all channels of one member (a norm in the activation):
    h = cat_i(act(Wg n [its channels]) ...)

    where the group is prepacked:
    h = act(packed_linear(n, pack_weight(Wg, tokens))) * ...      same shape, other order of bytes

Exact; see `concatenate`, which builds on it. Edits, searches nothing.
Source: arXiv 2503.18908, theorem 3.1; the fastest form: `python -m bench.chain_speed`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

import fxfusion.graph.prepacked  # noqa: F401  (registers the operators)
from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.passes.choose_form import tokens_to_pack_for
from fxfusion.passes.ffn import Branch, FfnNode, Group, Role
from fxfusion.passes.match_output import has_axes_of, is_flat, regroups_tokens
from fxfusion.passes.pack_weights import PACK_TAG, WeightPacker


@dataclass(frozen=True, slots=True)
class WideBuilder:
    """Builds one group's shared part on `stream`, the group's input as it is now."""

    editor: GraphEditor
    packer: WeightPacker
    group: Group
    stream: fx.Node

    @property
    def template(self) -> FfnNode:
        """The member whose norm and activation serve all."""
        return self.group.members[-1 if self.group.norm == "last" else 0]

    def middle(self) -> fx.Node:
        """What the down projection of one wide FFN reads, `[..., sum of widths]`."""
        if not self.group.members[0].segmented:
            return self._wide_middle(self._project())
        middles = self.middles()
        axes = next(filter(is_flat, middles), middles[0])  # one member may be computed on `[tokens, channels]`
        return self.editor.call(torch.cat, [regrouped(self.editor, one, axes, axes) for one in middles], -1)

    def middles(self) -> list[fx.Node]:
        """What each member's own down projection reads, `[..., width]`."""
        pieces = self._project()
        if self.group.members[0].segmented:
            return [self._own_middle(member, start, pieces) for member, start in self._starts()]
        wide = self._wide_middle(pieces)
        return [self.editor.channels(wide, start, start + member.width) for member, start in self._starts()]

    def linear(self, value: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """A linear layer; of a prepacked group on the weight in oneDNN's layout, where the weight is of the pack."""
        if not (self.group.is_prepacked and PACK_TAG in weight.meta):
            return self.editor.call(F.linear, value, weight, bias)
        tokens = tokens_to_pack_for(self.group)
        packed = self.editor.call(torch.ops.fxfusion.pack_weight.default, weight, tokens)
        packed.meta[PACK_TAG] = weight.meta.pop(PACK_TAG)  # so the dense wide weight is not kept
        return self.editor.call(torch.ops.fxfusion.packed_linear.default, value, packed, bias)

    def _starts(self) -> list[tuple[FfnNode, int]]:
        """Each member and its first channel of a wide piece."""
        found, start = [], 0
        for member in self.group.members:
            found.append((member, start))
            start += member.width
        return found

    def _project(self) -> dict[fx.Node, fx.Node]:
        """One wide linear layer per projection, cut into one wide piece per piece of the template."""
        pieces: dict[fx.Node, fx.Node] = {}
        template, packer, width = self.template, self.packer, self.group.width
        normed = plain_norm(self.editor, template, self.group.roles, self.stream)
        for number, _ in enumerate(template.projections):
            own = [piece for piece in template.pieces if piece.projection == number]
            weight, bias = packer.projection_weight(number), packer.projection_bias(number)
            wide = self.linear(normed, weight, bias)
            for place, piece in enumerate(own):
                start = place * width
                pieces[piece.node] = wide if len(own) == 1 else self.editor.channels(wide, start, start + width)
        return pieces

    def _wide_middle(self, pieces: dict[fx.Node, fx.Node]) -> fx.Node:
        """The template's activation on the wide pieces. Views in it regroup tokens only and are left out."""
        template, stand_in = self.template, dict(pieces)
        for index, constant in enumerate(template.middle_constants):
            stand_in[constant] = self.packer.middle_constant(index)

        def shown(node: fx.Node) -> fx.Node:
            while node in template.aliases and node not in stand_in:
                node = template.aliases[node]
            return stand_in.get(node, node)

        for node in template.middle:
            replace = {source: shown(source) for source in node.all_input_nodes}
            stand_in[node] = self.editor.clone((node,), replace)[node]
        return shown(template.down.input)

    def _own_middle(self, member: FfnNode, start: int, pieces: dict[fx.Node, fx.Node]) -> fx.Node:
        """One member's activation, with its own constants, on its channels of the wide pieces."""
        stand_in: dict[fx.Node, fx.Node] = {}
        for own, shared in zip(member.pieces, self.template.pieces, strict=True):
            like = self.editor.channels(pieces[shared.node], start, start + member.width)
            stand_in[own.node] = regrouped(self.editor, like, own.node, like)
        for node in member.nodes:
            if node not in stand_in and (node in member.middle or _shows(node, stand_in, member)):
                clone_region(self.editor, [node], stand_in, like)
        return stand_in[member.down.input]


def plain_norm(editor: GraphEditor, branch: Branch, roles: Sequence[Role], stream: fx.Node) -> fx.Node:
    """The branch's norm over `stream`, with gains that are folded set to one and shifts to zero."""
    if not branch.prologue:
        return stream
    replace = {branch.stream: stream}
    for constant, role in zip(branch.prologue_constants, roles, strict=True):
        if role != "fixed":
            example = ops.tensor_of(constant)
            fill = torch.ones if role == "gain" else torch.zeros
            replace[constant] = editor.call(fill, tuple(example.shape), dtype=example.dtype, device=example.device)
    return editor.clone(branch.prologue, replace)[branch.normed]


def _shows(node: fx.Node, values: Container[fx.Node], member: FfnNode) -> bool:
    """Whether the node is a view or a size of one of the values."""
    is_view = node in member.aliases or ops.is_shape_value(node)
    return is_view and any(source in values for source in node.all_input_nodes)


def clone_region(editor: GraphEditor, nodes: Iterable[fx.Node], values: dict[fx.Node, fx.Node], like: fx.Node) -> None:
    """Copy nodes in order, reading and extending `values`. Views that regroup tokens are made anew (`regrouped`)."""
    for node in nodes:
        if regroups_tokens(node):
            values[node] = regrouped(editor, values[node.all_input_nodes[0]], node, like)
        else:
            values[node] = editor.clone((node,), values)[node]


def regrouped(editor: GraphEditor, value: fx.Node, wanted: fx.Node, like: fx.Node) -> fx.Node:
    """The value with the token axes of `wanted`, which are those of `like` or `[tokens]`."""
    if has_axes_of(value, wanted):
        return value
    if is_flat(wanted):
        return editor.method("reshape", value, -1, ops.tensor_of(value).shape[-1])
    return editor.method("reshape_as", value, like)
