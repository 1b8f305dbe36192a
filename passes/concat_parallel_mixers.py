"""Join the projections of mixers that read one stream: one GEMM in, one GEMM out.

Before:
    y = x + o4(attention4(n4(x) W4^T));  z = y + o5(attention5(n5(x) W5^T))       W: q, k and v;  o: [hidden, heads]
After:
    n = norm(x) without gain;  w = n cat(W4 g4, W5 g5)^T
    z = x + cat(attention4(w[..., own 4]), attention5(w[..., own 5])) cat(o4, o5, dim=1)^T

Exact: gains are folded into weights, and a sum of linear layers is one linear layer on the concatenated inputs.
The attentions between stay one operation for each layer: each reads and writes its own layer's cache, and to join
their heads would copy the caches at every step. So heads, rotary angles, masks and q/k norms may differ.
Source: arXiv 2503.18908, appendix B (layers in parallel).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.build_wide import PACK_TAG, out_in, plain_norm
from fxfusion.passes.concatenate import STANDS_FOR
from fxfusion.passes.ffn import Branch, Linear, Mixer, Role
from fxfusion.passes.match_mixer import match_mixer
from fxfusion.passes.parallelise_mixers import stream_of
from fxfusion.passes.prove_norm import NormProver


class ConcatParallelMixers(Pass):
    """`blocks`: mixers that read one stream, in order. `first_index`: of the packs that it makes."""

    name: ClassVar[str] = "concat_parallel_mixers"
    exact: ClassVar[bool] = True

    def __init__(
        self, blocks: Sequence[Sequence[Mixer]], weights: frozenset[str], opaque: Mapping[str, str], first_index: int
    ) -> None:
        self.blocks = [list(block) for block in blocks if len(block) > 1]
        self.weights, self.opaque, self.first_index = weights, opaque, first_index

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        refusals: list[Refusal] = []
        for block in self.blocks:
            facts = GraphFacts(graph, self.weights)
            entry = stream_of(block[0])
            try:
                ends = [match_mixer(mixer, entry, facts, self.opaque) for mixer in block]
                roles = _roles(ends)
            except Refused as refused:
                refusals.append(_stay_apart(block[0], refused))
                continue
            _join(ends, roles, self.first_index + changed, self.name)
            changed += 1
        return PassResult(changed, refusals=tuple(refusals))


def _stay_apart(first: Mixer, refused: Refused) -> Refusal:
    """Their window stays as it is: several operations that read one stream."""
    message = f"the projections of its window stay apart: {refused.message}"
    return Refusal(code=refused.code, message=message, node=first.add.name, layer=first.layer)


def _roles(ends: Sequence[Branch]) -> tuple[Role, ...]:
    """Which constants of the mixers' norms go into their weights. Raises `Refused` where norms do not fit."""
    first = ends[0]
    roles = NormProver().roles(first)
    for other in ends[1:]:
        if other.prologue_structure != first.prologue_structure:
            raise Refused(RefusalCode.DIFFERENT_OPS, f"the norm of {other.name} differs from that of {first.name}")
        if other.hidden != first.hidden:
            raise Refused(RefusalCode.STRUCTURE, f"{other.name} writes another width than {first.name}")
    if "shift" in roles:
        raise Refused(RefusalCode.NORM_UNPROVED, f"the norm of {first.name} has a shift")
    for place, role in enumerate(roles):
        nodes = {end.prologue_constants[place] for end in ends}
        if role != "gain" and len(nodes) > 1:
            words = (
                f"{ends[-1].prologue_constants[place]} of the norm of {ends[-1].name} is no gain that could be folded"
            )
            raise Refused(RefusalCode.NORM_UNPROVED, words)
    return roles


def _join(ends: Sequence[Branch], roles: Sequence[Role], index: int, made_by: str) -> None:
    names = [end.name for end in ends]
    first, last = ends[0], ends[-1]
    editor = GraphEditor(first.projections[0].node, made_by, names)
    linears = [(linear, end.with_role("gain", roles)) for end in ends for linear in end.projections]
    weight = editor.call(torch.cat, [_folded(editor, linear, own) for linear, own in linears], 0)
    normed = plain_norm(editor, first, roles, first.stream)
    wide = editor.call(F.linear, normed, _packed(weight, index), _biases(editor, ends, index))
    start = 0
    for linear, _ in linears:
        piece = editor.channels(wide, start, start + linear.out_features)
        linear.node.replace_all_uses_with(piece)
        start += linear.out_features
    editor = GraphEditor(last.add, made_by, names)
    heads = editor.call(torch.cat, [end.down.input for end in ends], -1)
    weight = editor.call(torch.cat, [out_in(editor, end.down) for end in ends], 1)
    total = editor.call(F.linear, heads, _packed(weight, index), _summed_bias(editor, ends, index))
    result = editor.call(operator.add, first.stream, total)
    result.meta[STANDS_FOR] = last.add.name
    last.add.replace_all_uses_with(result)


def _folded(editor: GraphEditor, linear: Linear, gains: Sequence[fx.Node]) -> fx.Node:
    """The weight `[out, in]` times the norm's gains, rounded once."""
    weight = out_in(editor, linear)
    own = ops.tensor_of(linear.weight).dtype
    for gain in gains:
        wide = torch.promote_types(own, torch.float32)
        factor = editor.method("to", editor.method("reshape", gain, -1), wide)
        weight = editor.call(operator.mul, editor.method("to", weight, wide), factor)
    return editor.method("to", weight, own) if gains else weight


def _biases(editor: GraphEditor, ends: Sequence[Branch], index: int) -> fx.Node | None:
    linears = [linear for end in ends for linear in end.projections]
    if all(linear.bias is None for linear in linears):
        return None
    parts = [linear.bias or _zeros(editor, linear) for linear in linears]
    return _packed(editor.call(torch.cat, parts, 0), index)


def _summed_bias(editor: GraphEditor, ends: Sequence[Branch], index: int) -> fx.Node | None:
    biases = [end.down.bias for end in ends if end.down.bias is not None]
    if not biases:
        return None
    total = biases[0]
    for bias in biases[1:]:
        total = editor.call(operator.add, total, bias)
    return total if len(biases) == 1 else _packed(total, index)


def _zeros(editor: GraphEditor, linear: Linear) -> fx.Node:
    example = ops.tensor_of(linear.weight)
    return editor.call(torch.zeros, (linear.out_features,), dtype=example.dtype, device=example.device)


def _packed(node: fx.Node, index: int) -> fx.Node:
    node.meta[PACK_TAG] = index
    return node
