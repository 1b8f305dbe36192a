"""What every wide group is built from: one norm, wide projections, packed weights, copies of members' regions.

Before:
    ni = norm(x) * gi + si;  hi = Wi ni + bi                      hi: [..., width_i]; Wi: [width_i, hidden]
After:
    n = norm(x);  h = W n + b                                     h: [..., sum of widths], member after member
        W = cat_i(Wi * gi);  b = cat_i(bi + Wi si)

    where the group is prepacked:
    h = packed_linear(n, pack_weight(W, tokens), b)               same shape, other order of bytes

Exact: F.linear(x * g + s, W, b) = F.linear(x, W * g, b + W s). Products and sums are taken in float32 or wider and
rounded once to the weight's dtype. Packed weights are tagged, so that `lift_weights` can take them out of the graph:
they are computed once, never per call. The middles and ends (`kinds`) build the rest. Edits, searches nothing.
Source: arXiv 2503.18908, theorem 3.1 and section 5.5; the fastest form: `python -m bench.chain_speed`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

import fxfusion.graph.prepacked  # noqa: F401  (registers the operators)
from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.passes.choose_form import tokens_to_pack_for
from fxfusion.passes.ffn import Branch, FfnNode, Group, Linear, Piece, Role
from fxfusion.passes.match_pieces import has_axes_of, is_flat, regroups_tokens

PACK_TAG = "fxfusion_pack"


@dataclass(frozen=True, slots=True)
class WideBuilder:
    """Builds one group on `stream`, its input as it is now; packed weights are tagged with the group's `index`."""

    editor: GraphEditor
    group: Group
    index: int
    stream: fx.Node

    @property
    def template(self) -> FfnNode:
        """The member whose norm and activation serve all."""
        return self.group.members[-1 if self.group.norm == "last" else 0]

    def pieces(self) -> dict[fx.Node, fx.Node]:
        """One wide linear layer per projection, cut into one wide piece per piece of the template."""
        found: dict[fx.Node, fx.Node] = {}
        template, width = self.template, self.group.width
        normed = plain_norm(self.editor, template, self.group.roles, self.stream)
        for number, _ in enumerate(template.projections):
            own = _pieces_of(template, number)
            wide = self.linear(normed, self._weight(number), self._bias(number))
            for place, piece in enumerate(own):
                start = place * width
                found[piece.node] = wide if len(own) == 1 else self.editor.channels(wide, start, start + width)
        return found

    def starts(self) -> list[tuple[FfnNode, int]]:
        """Each member and its first channel of a wide piece."""
        found, start = [], 0
        for member in self.group.members:
            found.append((member, start))
            start += member.width
        return found

    def linear(self, value: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """A linear layer; of a prepacked group on the weight in oneDNN's layout, where the weight is of the pack."""
        if not (self.group.form == "prepacked" and PACK_TAG in weight.meta):
            return self.editor.call(F.linear, value, weight, bias)
        tokens = tokens_to_pack_for(self.group)
        packed = self.editor.call(torch.ops.fxfusion.pack_weight.default, weight, tokens)
        packed.meta[PACK_TAG] = weight.meta.pop(PACK_TAG)  # so the dense wide weight is not kept
        return self.editor.call(torch.ops.fxfusion.packed_linear.default, value, packed, bias)

    def joined(self, parts: Sequence[fx.Node], dim: int = 0) -> fx.Node:
        """A packed weight: the parts one after the other."""
        return self.packed(self.editor.call(torch.cat, list(parts), dim))

    def packed(self, node: fx.Node) -> fx.Node:
        """Tag a value that was computed; the one bias of a group is read where it is."""
        if node.op not in ("placeholder", "get_attr"):
            node.meta[PACK_TAG] = self.index
        return node

    def vector(self, node: fx.Node, length: int) -> fx.Node:
        """One number or a vector as `[length]`."""
        return self.editor.method("expand", self.editor.method("reshape", node, -1), length)

    def to(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if ops.tensor_of(node).dtype == dtype else self.editor.method("to", node, dtype)

    def _weight(self, number: int) -> fx.Node:
        """`[pieces * sum of widths, hidden]`: piece by piece, in each piece member by member."""
        parts = self._parts(number)
        return self.joined([self._fold_gains(member, self._rows(member, piece)) for member, piece in parts])

    def _bias(self, number: int) -> fx.Node | None:
        """`[pieces * sum of widths]`, or None where no member has a bias and no shift is folded."""
        no_shift = "shift" not in self.group.roles
        if no_shift and all(member.projections[number].bias is None for member in self.group.members):
            return None
        return self.joined([self._bias_of(member, piece) for member, piece in self._parts(number)])

    def _parts(self, number: int) -> list[tuple[FfnNode, Piece]]:
        """Each member's pieces of a projection, in the order in which they lie in the wide one."""
        members = self.group.members
        places = zip(*(_pieces_of(member, number) for member in members), strict=True)
        return [pair for pieces in places for pair in zip(members, pieces, strict=True)]

    def _rows(self, member: FfnNode, piece: Piece) -> fx.Node:
        """The rows of a projection's weight that make one piece, `[width, hidden]`."""
        return self._cut(out_in(self.editor, member.projections[piece.projection]), member, piece)

    def _cut(self, value: fx.Node, member: FfnNode, piece: Piece) -> fx.Node:
        if (piece.start, piece.stop, piece.step) == (0, member.projections[piece.projection].out_features, 1):
            return value
        return self.editor.call(operator.getitem, value, slice(piece.start, piece.stop, piece.step))

    def _fold_gains(self, member: FfnNode, rows: fx.Node) -> fx.Node:
        dtype, wide = ops.tensor_of(rows).dtype, wide_dtype(rows)
        for gain in member.with_role("gain", self.group.roles):
            factor = self.to(self.editor.method("reshape", gain, -1), wide)
            rows = self.editor.call(operator.mul, self.to(rows, wide), factor)
        return self.to(rows, dtype)

    def _bias_of(self, member: FfnNode, piece: Piece) -> fx.Node:
        linear = member.projections[piece.projection]
        wide = wide_dtype(linear.weight)
        total: fx.Node | None = None
        if linear.bias is not None:
            total = self.to(self._cut(linear.bias, member, piece), wide)
        rows = self.to(self._rows(member, piece), wide)
        for shift in member.with_role("shift", self.group.roles):
            vector = self.to(self.vector(shift, member.hidden), wide)
            # Not `torch.mv`: autocast would round it.
            moved = self.editor.method("sum", self.editor.call(operator.mul, rows, vector), -1)
            total = moved if total is None else self.editor.call(operator.add, total, moved)
        like = ops.tensor_of(linear.weight)
        if total is None:
            total = self.editor.call(torch.zeros, (member.width,), dtype=wide, device=like.device)
        return self.to(total, like.dtype)


def _pieces_of(ffn: FfnNode, number: int) -> list[Piece]:
    return [piece for piece in ffn.pieces if piece.projection == number]


def out_in(editor: GraphEditor, linear: Linear) -> fx.Node:
    """The weight as `[out, in]`."""
    return editor.method("t", linear.weight) if linear.transposed else linear.weight


def wide_dtype(node: fx.Node) -> torch.dtype:
    return torch.promote_types(ops.tensor_of(node).dtype, torch.float32)


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
