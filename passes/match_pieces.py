"""Which output channels of a projection the middle of an FFN reads: whole, halves, or every other one.

Matches (no edit):
    h = linear(n, W)                                      whole: channels 0:width
    gate, up = h.chunk(2, -1) | h.split(width, -1) | h.tensor_split(2, -1)
    gate, up = h[..., :width], h[..., width:]             packed, one behind the other
    gate, up = h[..., ::2], h[..., 1::2]                  packed, interleaved
Views that keep the channel axis are looked through.
Source: packed gate/up as several model families store it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.passes.ffn import Linear, Piece

VIEWS = frozenset("view reshape view_as flatten unflatten squeeze unsqueeze contiguous clone".split())
RESHAPES = VIEWS - {"contiguous", "clone"}

_Range = tuple[int, int, int]


@dataclass
class Cuts:
    """What a walk over the middle found. `pieces`: cut or whole projection outputs that others read.

    `aliases`: views, and the value they show. `holders`: nodes that only carry pieces (chunk).
    """

    pieces: dict[fx.Node, Piece] = field(default_factory=dict)
    aliases: dict[fx.Node, fx.Node] = field(default_factory=dict)
    holders: dict[fx.Node, tuple[int, list[_Range]]] = field(default_factory=dict)

    def resolve(self, node: fx.Node) -> fx.Node:
        """The value that the node shows, views looked through."""
        while node in self.aliases:
            node = self.aliases[node]
        return node


def match_pieces(projections: Sequence[Linear], middle: Iterable[fx.Node]) -> Cuts:
    """Follow each projection's output through views and cuts along the channel axis."""
    cuts = Cuts()
    for index, linear in enumerate(projections):
        cuts.pieces[linear.node] = Piece(node=linear.node, projection=index, start=0, stop=linear.out_features)
    for node in middle:
        sources = [
            source for source in node.all_input_nodes if not ops.is_shape_value(source) or source in cuts.holders
        ]
        if not sources:
            continue
        source = cuts.resolve(sources[0])
        name = ops.op_name(node)
        if name in VIEWS and keeps_channels(node, sources[0]):
            cuts.aliases[node] = sources[0]
        elif source in cuts.holders and name == "getitem" and isinstance(node.args[1], int):
            projection, ranges = cuts.holders[source]
            start, stop, step = ranges[node.args[1]]
            cuts.pieces[node] = Piece(node=node, projection=projection, start=start, stop=stop, step=step)
        elif source in cuts.pieces:
            _cut(node, sources[0], cuts.pieces[source], cuts)
    return cuts


def keeps_channels(node: fx.Node, source: fx.Node) -> bool:
    """Whether a view leaves the last axis as it is (`view(dtype)` reads the same bits as other numbers)."""
    channels = ops.shape_of(source)[-1:]
    return channels != () and channels == ops.shape_of(node)[-1:] and ops.dtype_name(source) == ops.dtype_name(node)


def _cut(node: fx.Node, shown: fx.Node, source: Piece, cuts: Cuts) -> None:
    """Note what a node cuts out of a piece, which it reads as `shown` (a view of it has its own axes)."""
    name = ops.op_name(node)
    dim_count = getattr(ops.tensor_value(shown), "ndim", 0)
    if name == "getitem":
        index = _last_axis_slice(node.args[1], dim_count)
        if index is not None:
            cuts.pieces[node] = _within(node, source, index)
    elif name in ("slice", "narrow"):
        index = _aten_slice(node, name, dim_count)
        if index is not None:
            cuts.pieces[node] = _within(node, source, index)
    elif name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        sizes = _split_sizes(node, name, source.width, dim_count)
        if sizes is not None and source.step == 1:
            edges = [source.start]
            for size in sizes:
                edges.append(edges[-1] + size)
            cuts.holders[node] = (source.projection, [(a, b, 1) for a, b in zip(edges, edges[1:], strict=False)])


def _within(node: fx.Node, source: Piece, index: slice) -> Piece:
    """The piece that a slice of a piece is, in channels of the projection."""
    channels = range(source.start, source.stop, source.step)[index]
    return Piece(node=node, projection=source.projection, start=channels.start, stop=channels.stop, step=channels.step)


def _last_axis_slice(index: Any, dim_count: int) -> slice | None:
    """The slice that an index takes of the last axis while it leaves every other axis whole."""
    if not isinstance(index, tuple) or not index:
        return None
    *rest, last = index
    full = slice(None, None, None)
    whole = all(item is Ellipsis or item == full for item in rest)
    reaches_last = Ellipsis in rest or len(index) == dim_count
    plain = isinstance(last, slice) and all(
        isinstance(v, (int, type(None))) for v in (last.start, last.stop, last.step)
    )
    return last if whole and reaches_last and plain and (last.step or 1) > 0 else None


def _aten_slice(node: fx.Node, name: str, dim_count: int) -> slice | None:
    dim, start, third = ops.argument(node, 1, "dim", 0), ops.argument(node, 2, "start"), node.args[3:4]
    if not isinstance(dim, int) or dim % max(dim_count, 1) != dim_count - 1:
        return None
    stop = third[0] if third else node.kwargs.get("length" if name == "narrow" else "end")
    if name == "narrow":
        return slice(start, start + stop) if isinstance(start, int) and isinstance(stop, int) else None
    step = ops.argument(node, 4, "step", 1)
    values = (start, stop, step)
    return slice(*values) if all(isinstance(value, (int, type(None))) for value in values) else None


def _split_sizes(node: fx.Node, name: str, width: int, dim_count: int) -> list[int] | None:
    """Sizes of the parts, or None unless the last axis is cut by plain numbers."""
    amount = (
        node.args[1]
        if len(node.args) > 1
        else _first(
            node.kwargs,
            "chunks",
            "split_size_or_sections",
            "split_size",
            "split_sizes",
            "indices_or_sections",
            "sections",
        )
    )
    dim = ops.argument(node, 2, "dim", 0)
    if not isinstance(dim, int) or dim % max(dim_count, 1) != dim_count - 1:
        return None
    if isinstance(amount, (list, tuple)):
        if name == "tensor_split" or not all(isinstance(size, int) for size in amount):
            return None
        return list(amount)
    if not isinstance(amount, int) or amount <= 0:
        return None
    if name == "tensor_split":
        return [width // amount + (part < width % amount) for part in range(amount)]
    size = amount if name.startswith("split") else -(-width // amount)
    return [min(size, width - start) for start in range(0, width, size)]


def _first(kwargs: Mapping[str, Any], *names: str) -> Any:
    return next((kwargs[name] for name in names if name in kwargs), None)


def behind_views(node: fx.Node) -> fx.Node:
    """The value that was regrouped into `[tokens, hidden]` or back to make the node."""
    return (node, *views_behind(node))[-1]


def views_behind(node: fx.Node) -> tuple[fx.Node, ...]:
    """The values that a regrouped one was made from, nearest first; none where it is no view."""
    found = []
    while ops.op_name(node) in VIEWS and keeps_channels(node, node.all_input_nodes[0]):
        node = node.all_input_nodes[0]
        found.append(node)
    return tuple(found)


def regroups_tokens(node: fx.Node) -> bool:
    """Whether the node is a view that leaves the channel axis as it is."""
    return ops.op_name(node) in RESHAPES and keeps_channels(node, node.all_input_nodes[0])


def check_axes(nodes: Iterable[fx.Node], like: fx.Node, code: RefusalCode) -> None:
    """Raises `Refused` unless all values have the token axes of another, or are `[tokens, channels]`."""
    for node in nodes:
        if not (has_axes_of(node, like) or is_flat(node)):
            raise Refused(code, f"{ops.op_name(node)} groups the tokens in another way than {like}", node)


def has_axes_of(node: fx.Node, like: fx.Node) -> bool:
    """Whether two values have the same token axes."""
    return ops.shape_of(node)[:-1] == ops.shape_of(like)[:-1]


def is_flat(node: fx.Node) -> bool:
    """Whether the value is `[tokens, channels]`."""
    value = ops.tensor_value(node)
    return value is not None and value.dim() == 2
