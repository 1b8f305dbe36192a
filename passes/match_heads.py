"""Find how the projections of a mixer are cut into heads, and whether mixers differ in their weights alone.

Matches (no edit):
    q = linear(n, Wq).view(batch, seq, heads, d)                        one piece, `heads` heads
    q, k, v = linear(n, Wqkv).split([h, kv, kv], -1), each viewed so    three pieces of one projection
    linear(context.reshape(batch, seq, heads * d), Wo)                  the heads that the mixer ends with
Then several mixers that read one stream are one mixer with more heads: their pieces one after the other.
Source: arXiv 2503.18908, appendix B (layers in parallel).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.isomorphism import Structure, describe_region, first_difference
from fxfusion.passes.ffn import Branch, Piece
from fxfusion.passes.match_pieces import VIEWS, Cuts, match_pieces

_BY_NUMBER = frozenset("mul div neg clamp".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerHeads:
    """What lies between the ends of a mixer. `pieces`: of the projections, in order; `counts`: the heads of each;
    `out_count`: the heads that `out` reads. `constants`: what is read between the ends, and is no weight or bias of
    theirs; `structure`: of all of it, the ends' constants included."""

    ends: Branch
    pieces: tuple[Piece, ...]
    counts: tuple[int, ...]
    out_count: int
    constants: tuple[fx.Node, ...]
    structure: Structure


def match_heads(ends: Branch, facts: GraphFacts) -> MixerHeads:
    """Raises `Refused` where a projection is not cut into heads."""
    nodes = facts.slice_between(ends.down.input, ends.normed).nodes
    cuts = match_pieces(ends.projections, nodes)
    found = [(piece, count) for piece, count in _leaves(ends, cuts, nodes)]
    found.sort(key=lambda pair: (pair[0].projection, pair[0].start))
    for number, linear in enumerate(ends.projections):
        edges = [(piece.start, piece.stop) for piece, _ in found if piece.projection == number and piece.step == 1]
        if [start for start, _ in edges] + [linear.out_features] != [0, *(stop for _, stop in edges)]:
            raise Refused(RefusalCode.STRUCTURE, f"{ends.name} does not read {linear.node} in whole heads, each once")
    own = {node for linear in (*ends.projections, ends.down) for node in (linear.weight, linear.bias)}
    constants = facts.constants_of(nodes)
    places = {ends.normed: "x"} | {node: f"c{index}" for index, node in enumerate(constants)}
    return MixerHeads(
        ends=ends,
        pieces=tuple(piece for piece, _ in found),
        counts=tuple(count for _, count in found),
        out_count=_merged(ends),
        constants=tuple(node for node in constants if node not in own),
        structure=describe_region(nodes, places),
    )


def check_alike(mixers: Sequence[MixerHeads]) -> None:
    """Raises `Refused` unless one mixer with the heads of all of them computes what they do."""
    first = mixers[0]
    for other in mixers[1:]:
        pair = f"{other.ends.name} and {first.ends.name}"
        if _sizes(other) != _sizes(first):
            raise Refused(RefusalCode.STRUCTURE, f"{pair} have heads of other numbers or sizes")
        for one, two, what in (
            (other.structure, first.structure, "compute differently"),
            (other.ends.prologue_structure, first.ends.prologue_structure, "have different norms"),
        ):
            reason = first_difference(one, two)
            if reason is not None:
                raise Refused(reason[0], f"{pair} {what}: {reason[1]}")


def _sizes(mixer: MixerHeads) -> tuple[object, ...]:
    channels = tuple((piece.projection, piece.start, piece.stop) for piece in mixer.pieces)
    return channels, mixer.counts, mixer.out_count, mixer.ends.down.in_features, mixer.ends.hidden


def _leaves(ends: Branch, cuts: Cuts, nodes: Sequence[fx.Node]) -> Iterable[tuple[Piece, int]]:
    """The pieces that are not cut any further, and into how many heads each is viewed."""
    shown: dict[fx.Node, list[fx.Node]] = {node: [node] for node in cuts.pieces}
    scaled: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = next(iter(node.all_input_nodes), node)
        whole = cuts.resolve(scaled.get(source, source))
        if whole in shown and (node in cuts.aliases or (_is_by_number(node) and source in shown[whole])):
            shown[whole].append(node)
            scaled[node] = whole
    known = {*cuts.pieces, *cuts.aliases, *cuts.holders, *scaled}
    for node, forms in shown.items():
        readers = [(form, user) for form in forms for user in form.users if user in nodes and user not in known]
        counts = {_split(ends, node, form, user) for form, user in readers if not ops.is_shape_value(user)}
        if len(counts) > 1:
            raise Refused(RefusalCode.STRUCTURE, f"{ends.name} cuts {node} into heads in {len(counts)} ways", node)
        if counts:
            yield cuts.pieces[node], counts.pop()


def _is_by_number(node: fx.Node) -> bool:
    """Whether each channel is changed by itself, and all in the same way."""
    return ops.op_name(node) in _BY_NUMBER and len(node.all_input_nodes) == 1


def _split(ends: Branch, piece: fx.Node, form: fx.Node, reader: fx.Node) -> int:
    """Into how many heads a reader of a piece cuts it, or sees it cut: a view that gives one head an axis of its own
    is a form of the piece."""
    count = _outermost(reader, form) if ops.op_name(reader) in VIEWS else None
    count = count or _outermost(form, piece)
    if count is None:
        words = f"{ends.name} computes {ops.op_name(reader)} of all channels of {piece}, before they are cut into heads"
        raise Refused(RefusalCode.STRUCTURE, words, reader)
    return count


def _merged(ends: Branch) -> int:
    node = ends.down.input
    count = None
    while ops.op_name(node) in VIEWS and count is None:
        count = _outermost(node.all_input_nodes[0], node)
        node = node.all_input_nodes[0]
    if count is None:
        raise Refused(RefusalCode.STRUCTURE, f"what {ends.name} ends with is no sequence of heads", node)
    return count


def _outermost(cut: fx.Node, whole: fx.Node) -> int | None:
    """The first of the last axes of `cut`, two at least, that together are the last axis of `whole`."""
    one, other = ops.tensor_value(cut), ops.tensor_value(whole)
    if one is None or other is None or one.numel() != other.numel():
        return None
    sizes = [int(size) for size in one.shape]
    fitting = [axes for axes in range(2, len(sizes)) if prod(sizes[-axes:]) == int(other.shape[-1])]
    return sizes[-fitting[-1]] if fitting else None
