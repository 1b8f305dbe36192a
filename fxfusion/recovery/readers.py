"""The linear layers that read the residual stream first, and their likes in the reference: what the other side of a
refit changes.

    x ─ norm ─ s ─┬─ gate     x: the stream before the block; s: `[..., hidden]`
                  └─ up       of a fused group: rows of every member

Found in a captured graph by dataflow, beside the block's last linear layer (`projections.py`), and by the names that
parameters have in the model as it was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.traced import TracedGraph
from fxfusion.passes.ffn import Linear
from fxfusion.recovery.projections import Kind, Projection, Target, joined, own_names, sites, target_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some rows of one linear layer, and the rows of the reference's layer that they stand for.

    `member`: which of the reader's `sources` it is. Names are of parameters: `weight` and `bias` in the model that is
    refitted, `source` and `source_bias` in the model as it was loaded; a bias is None where there is none.
    """

    weight: str
    bias: str | None
    transposed: bool
    rows: slice
    source: str
    source_bias: str | None
    source_transposed: bool
    source_rows: slice
    member: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """All linear layers of one block that read its normed stream. Layers are numbered as in the model as it was loaded.

    `place`: of the block among `sites(graph)`. `members`: of a fused group. `first`: of its window, or its own layer:
    the reference's stream before that knows nothing of what is read here. `sources`: for each member a weight whose
    input in the reference is what the member should read. `target`: the block's last layer, where the reference has
    the stream after it. `refused`: why it must stay as it is; empty where it need not.
    """

    kind: Kind
    layer: int
    members: tuple[int, ...]
    first: int
    place: int
    hidden: int
    parts: tuple[Part, ...]
    sources: tuple[str, ...]
    target: Projection | None
    refused: str = ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of those that a refit may change: weights, and biases where there are any."""
        names = [name for part in self.parts for name in (part.weight, part.bias) if name is not None]
        return tuple(dict.fromkeys(names))

    @property
    def linears(self) -> tuple[str, ...]:
        """Module paths of the linear layers."""
        return tuple(dict.fromkeys(part.weight.removesuffix(".weight") for part in self.parts))

    @property
    def name(self) -> str:
        """For messages."""
        return " and ".join(self.linears)


def find_readers(
    model: nn.Module,
    graph: TracedGraph,
    recipe: FuseRecipe | None,
    reference: Mapping[str, Linear],
    targets: Sequence[Projection],
) -> list[Reader]:
    """Those of every block whose first linear layers read one value, and have their likes in the reference.

    `reference`: its linear layers, by the name of their weight (`linears_of`). `targets`: where its stream is known.
    """
    name_of = own_names(model, graph)
    groups = joined(recipe)
    known = {one.place: one for one in targets}
    windows = {} if recipe is None else {layer: group.layers for group in recipe.groups for layer in group.layers}
    found = []
    for place, site in enumerate(sites(graph)):
        layer = site.layer if recipe is None else recipe.kept[site.layer]
        group = groups.get((site.kind, layer))
        names = [name_of(linear.weight) for linear in site.entries]
        parts = [
            part
            for linear, name in zip(site.entries, names, strict=True)
            if name is not None
            for part in _parts(linear, name, name_of(linear.bias), recipe, group, reference)
        ]
        sources = [part.source for part in parts]
        if not parts or None in names or not all(source in reference for source in sources):
            continue
        found.append(
            Reader(
                kind=site.kind,
                layer=layer,
                members=() if group is None else tuple(sorted(group.layers)),
                first=min(windows.get(layer, (layer,))),
                place=place,
                hidden=site.entries[0].in_features,
                parts=tuple(parts),
                sources=tuple(next(part.source for part in parts if part.member == one) for one in _members(parts)),
                target=known.get(place),
                refused="" if group is None else _refused(group),
            )
        )
    return found


def _refused(group: GroupRecipe) -> str:
    """A wide layer's bias that is made of a norm's shift follows from its rows in each member, and is no free value."""
    without = [matrix.weight for member in group.members for matrix in member.projections if matrix.bias is None]
    return f"{without[0]} has no bias, and the shift of its norm became one" if group.in_bias and without else ""


def _members(parts: Sequence[Part]) -> range:
    return range(1 + max(part.member for part in parts))


def _parts(
    linear: Linear,
    name: str,
    bias: str | None,
    recipe: FuseRecipe | None,
    group: GroupRecipe | None,
    reference: Mapping[str, Linear],
) -> Iterator[Part]:
    """One for each run of a member's channels; of a layer that is not fused, one for all."""
    own = name if recipe is None else recipe.unfused_name(name)
    numbers = [] if group is None else [matrix.weight for matrix in group.home.projections]
    if group is None or own not in numbers:
        whole = slice(0, linear.out_features)
        places = [(own, bias and (bias if recipe is None else recipe.unfused_name(bias)), whole, whole, 0)]
    else:
        number = numbers.index(own)
        places = [
            (member.projections[number].weight, member.projections[number].bias, target, source, index)
            for index, member in enumerate(group.members)
            for target, source in group.slices(number, index)
        ]
    for source, source_bias, rows, source_rows, member in places:
        yield Part(
            weight=name,
            bias=bias,
            transposed=linear.transposed,
            rows=rows,
            source=source,
            source_bias=source_bias,
            source_transposed=reference[source].transposed if source in reference else False,
            source_rows=source_rows,
            member=member,
        )


def choose_readers(found: Sequence[Reader], targets: Sequence[Projection], first: int, later: str) -> list[Reader]:
    """Which of them to refit: those of the projections that are (`targets`), and of attention that went before the FFNs
    of its window, from layer `first` on. `later`: see `refit`."""
    places = {one.place for one in targets}
    return [
        one
        for one in found
        if one.place in places or (later == "all" and one.kind == "attention" and first <= one.layer != one.first)
    ]


def anchor_of(reader: Reader, reference: TracedGraph) -> fx.Node:
    """The reference's stream from which all can be computed that the reader, and what comes after it, is fitted to."""
    blocks = reference.blocks
    parts = blocks.mixers if reader.kind == "attention" and reader.layer == reader.first else blocks.ffns
    if reader.kind == "attention" and reader.members:
        parts = blocks.mixers
    found = [block for block in (*parts, *blocks.layers) if block.layer == reader.first]
    return found[0].stream


def aim_of(reader: Reader, reference: TracedGraph) -> Target:
    """The stream after the block, or what the reference's block adds to its stream where it has no such stream."""
    if reader.target is not None:
        return target_of(reader.target, reference)
    (block,) = reference.blocks.mixers_of([reader.layer])
    return Target((block.after,), (block.before,), anchor_of(reader, reference))
