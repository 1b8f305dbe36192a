"""Build the wide weights of one group as nodes: cut, fold, concatenate.

Before:
    Wg_i [width_i, hidden], g_i [hidden], s_i [hidden], Wd_i [hidden, width_i], scale_i [hidden]
After:
    Wg = cat_i(Wg_i * g_i)               [sum of widths, hidden]
    bg = cat_i(bg_i + Wg_i s_i)          [sum of widths]
    Wd = cat_i(scale_i * Wd_i, dim=1)    [hidden, sum of widths];   bd = sum_i(scale_i * bd_i)

Exact: F.linear(x * g + s, W, b) = F.linear(x, W * g, b + W s). Products and sums are taken in float32
or wider and rounded once to the weight's dtype. The nodes are tagged, so that `lift_weights` can take
them out of the graph: they are computed once, never per call.
Source: arXiv 2503.18908, theorem 3.1 and section 5.5.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.passes.choose_form import packs_downs
from fxfusion.passes.ffn import FfnNode, Group, Linear

PACK_TAG = "fxfusion_pack"


class WeightPacker:
    """Creates the packed weights of one group, each tagged with the group's index."""

    def __init__(self, editor: GraphEditor, group: Group, index: int) -> None:
        self.editor = editor
        self.group = group
        self.index = index

    def projection_weight(self, number: int) -> fx.Node:
        """`[pieces * sum of widths, hidden]`: piece by piece, in each piece member by member."""
        parts = [
            self._fold_gains(member, self._rows(member, number, place))
            for place in range(self._piece_count(number))
            for member in self.group.members
        ]
        return self._packed(self._cat(parts, 0))

    def projection_bias(self, number: int) -> fx.Node | None:
        """`[pieces * sum of widths]`, or None where no member has a bias and no shift is folded."""
        shifted = "shift" in self.group.roles
        if not shifted and all(member.projections[number].bias is None for member in self.group.members):
            return None
        parts = [
            self._projection_bias_part(member, number, place)
            for place in range(self._piece_count(number))
            for member in self.group.members
        ]
        return self._packed(self._cat(parts, 0))

    def middle_constant(self, index: int) -> fx.Node:
        """A constant of the activation: itself where it is one shared number, else one value per wide channel."""
        nodes = [member.middle_constants[index] for member in self.group.members]
        example = ops.tensor_value(nodes[0])
        if all(node is nodes[0] for node in nodes) and (example is None or example.numel() == 1):
            return nodes[0]
        parts = [self._vector(node, member.width) for node, member in zip(nodes, self.group.members, strict=True)]
        return self._packed(self._cat(parts, 0))

    def down_weight(self) -> fx.Node:
        """`[hidden, sum of widths]`, scales of the tails folded in."""
        parts = []
        for member in self.group.members:
            weight = out_in(self.editor, member.down)
            for kind, value in member.tail:
                if kind == "mul":
                    weight = self._scale_rows(weight, value, member.hidden)
            parts.append(self._to(weight, ops.tensor_of(member.down.weight).dtype))
        return self._packed(self._cat(parts, 1))

    def own_down(self, member: FfnNode) -> tuple[fx.Node, fx.Node | None]:
        """One member's weight `[hidden, width]` and bias: as they are, or a weight of the pack for another layout."""
        weight = out_in(self.editor, member.down)
        return self._packed(self._cat([weight], 0)) if packs_downs(self.group) else weight, member.down.bias

    def down_bias(self) -> fx.Node | None:
        """`[hidden]`: the sum of the members' biases and shifts, or None where there are none."""
        parts = [part for member in self.group.members if (part := self._down_bias_part(member)) is not None]
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self.editor.call(operator.add, total, part)
        return self._packed(self._to(total, ops.tensor_of(self.group.members[0].down.weight).dtype))

    def _down_bias_part(self, member: FfnNode) -> fx.Node | None:
        wide = self._wide_dtype(member.down.weight)
        bias: fx.Node | None = self._to(member.down.bias, wide) if member.down.bias is not None else None
        for kind, value in member.tail:
            factor = self._to(self._vector(value, member.hidden), wide) if isinstance(value, fx.Node) else value
            if bias is not None:
                bias = self.editor.call(operator.mul if kind == "mul" else operator.add, bias, factor)
            elif kind == "add" and isinstance(factor, fx.Node):
                bias = factor
        return bias

    def _piece_count(self, number: int) -> int:
        return sum(piece.projection == number for piece in self.group.members[0].pieces)

    def _rows(self, member: FfnNode, number: int, place: int) -> fx.Node:
        """The rows of a projection's weight that make one piece, `[width, hidden]`."""
        linear = member.projections[number]
        return self._cut(out_in(self.editor, linear), member, number, place)

    def _cut(self, value: fx.Node, member: FfnNode, number: int, place: int) -> fx.Node:
        piece = [piece for piece in member.pieces if piece.projection == number][place]
        if (piece.start, piece.stop, piece.step) == (0, member.projections[number].out_features, 1):
            return value
        return self.editor.call(operator.getitem, value, slice(piece.start, piece.stop, piece.step))

    def _fold_gains(self, member: FfnNode, rows: fx.Node) -> fx.Node:
        dtype, wide = ops.tensor_of(rows).dtype, self._wide_dtype(rows)
        for gain in member.with_role("gain", self.group.roles):
            factor = self._to(self.editor.method("reshape", gain, -1), wide)
            rows = self.editor.call(operator.mul, self._to(rows, wide), factor)
        return self._to(rows, dtype)

    def _projection_bias_part(self, member: FfnNode, number: int, place: int) -> fx.Node:
        linear = member.projections[number]
        wide = self._wide_dtype(linear.weight)
        total: fx.Node | None = None
        if linear.bias is not None:
            total = self._to(self._cut(linear.bias, member, number, place), wide)
        rows = self._to(self._rows(member, number, place), wide)
        for shift in member.with_role("shift", self.group.roles):
            vector = self._to(self._vector(shift, member.hidden), wide)
            # Not `torch.mv`: autocast would round it.
            moved = self.editor.method("sum", self.editor.call(operator.mul, rows, vector), -1)
            total = moved if total is None else self.editor.call(operator.add, total, moved)
        like = ops.tensor_of(linear.weight)
        if total is None:
            total = self.editor.call(torch.zeros, (member.width,), dtype=wide, device=like.device)
        return self._to(total, like.dtype)

    def _scale_rows(self, weight: fx.Node, value: fx.Node | float, hidden: int) -> fx.Node:
        wide = self._wide_dtype(weight)
        factor: fx.Node | float = value
        if isinstance(value, fx.Node):
            factor = self.editor.method("unsqueeze", self._to(self._vector(value, hidden), wide), -1)
        return self.editor.call(operator.mul, self._to(weight, wide), factor)

    def _vector(self, node: fx.Node, length: int) -> fx.Node:
        """One number or a vector as `[length]`."""
        return self.editor.method("expand", self.editor.method("reshape", node, -1), length)

    def _to(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if ops.tensor_of(node).dtype == dtype else self.editor.method("to", node, dtype)

    def _wide_dtype(self, node: fx.Node) -> torch.dtype:
        return torch.promote_types(ops.tensor_of(node).dtype, torch.float32)

    def _cat(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        return self.editor.call(torch.cat, list(parts), dim)

    def _packed(self, node: fx.Node) -> fx.Node:
        """Tag a value that was computed; the one bias of a group is read where it is."""
        if node.op not in ("placeholder", "get_attr"):
            node.meta[PACK_TAG] = self.index
        return node


def out_in(editor: GraphEditor, linear: Linear) -> fx.Node:
    """The weight as `[out, in]`."""
    return editor.method("t", linear.weight) if linear.transposed else linear.weight
