"""The linear layers whose results go into the residual stream: those that a refit can change.

    after = before + scale * (h W^T + b) + ...        before, after: the stream, `[..., hidden]`; h: `[..., width]`

Found in a captured graph by dataflow: the last linear layer of each FFN, fused or not, and of each attention that is
added to the stream by itself. Whatever stands between it and the stream must be constant scales and shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx, nn

from fxfusion.errors import Refused, SurgeryError
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.traced import TracedGraph
from fxfusion.passes.ffn import Linear, TailStep
from fxfusion.passes.kinds import match_end
from fxfusion.passes.match_linear import match_linear
from fxfusion.passes.match_residual import match_residual, mixes_tokens

Kind = Literal["ffn", "attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Such a layer in one graph. `layer`: its decoder layer there; `before`, `after`: the stream around its block;
    `entries`: the block's linear layers that read the (normed) stream, all of them one value; none where they do not.
    """

    kind: Kind
    layer: int
    linear: Linear
    tail: tuple[TailStep, ...]
    before: fx.Node
    after: fx.Node
    entries: tuple[Linear, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One layer to refit. Layers are numbered as in the model as it was loaded.

    `place`: which of `sites(graph)` it is, in the graph of any batch. `until`: the layer at whose end the reference's
    stream is the target (for attention: after that layer's attention): a later one where layers behind it were removed,
    for which it stands in as well (`replaces`). `members`: layers of a fused group, whose FFNs
    or, in a wide block, whose attentions became this one. `weight`, `bias`: parameter names in the model that is
    refitted; the bias is None where it has none.
    """

    kind: Kind
    layer: int
    until: int
    members: tuple[int, ...]
    place: int
    weight: str
    bias: str | None
    transposed: bool
    width: int
    hidden: int
    replaces: bool = False

    @property
    def name(self) -> str:
        """Module path of the layer in the model that is refitted (or name of its weight)."""
        return self.weight.removesuffix(".weight")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of those that a refit may change."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def out_in(self, stored: Tensor) -> Tensor:
        """The weight as `[hidden, width]`, a view."""
        return stored.t() if self.transposed else stored


def sites(graph: TracedGraph) -> list[Site]:
    """All such layers of a graph, in its order: equal for graphs of the same model on other shapes."""
    captured = graph.captured
    facts = GraphFacts(captured.module.graph, captured.weights)
    blocks = {block.after: block for block in (*graph.blocks.mixers, *graph.blocks.ffns)}
    found = []
    for ffn in match_residual(facts, {}).ffns:
        block = blocks.get(ffn.add)
        if block is not None and _ends_layer(block, graph) and not ffn.end.no_module:
            found.append(_site("ffn", block, ffn.down, ffn.end.steps, ffn.projections))
    for block in graph.blocks.mixers:
        last = _last_linear(block, facts)
        if last is not None:
            found.append(_site("attention", block, *last))
    return sorted(found, key=lambda site: facts.order[site.after])


def _site(
    kind: Kind, block: ResidualBlock, linear: Linear, tail: tuple[TailStep, ...], entries: tuple[Linear, ...]
) -> Site:
    inputs = {entry.input for entry in entries}
    return Site(
        kind=kind,
        layer=block.layer,
        linear=linear,
        tail=tail,
        before=block.before,
        after=block.after,
        entries=entries if len(inputs) == 1 else (),
    )


def _ends_layer(block: ResidualBlock, graph: TracedGraph) -> bool:
    """Whether the stream after the block is what its decoder layer hands on."""
    end = next(layer.after for layer in graph.blocks.layers if layer.layer == block.layer)
    return _unviewed(end) is _unviewed(block.after)


def _unviewed(node: fx.Node) -> fx.Node:
    while ops.op_name(node) in ("view", "reshape"):
        node = node.all_input_nodes[0]
    return node


def _last_linear(
    block: ResidualBlock, facts: GraphFacts
) -> tuple[Linear, tuple[TailStep, ...], tuple[Linear, ...]] | None:
    """An attention's output projection, where the attention is an addition to the stream of its own; and its linear
    layers that no other linear layer of it, and no other token, comes before."""
    if block.before is not block.stream or not block.branches:
        return None
    branch = block.branches[0]
    found = facts.slice_between(branch, block.stream)
    linears = [linear for node in found.nodes if (linear := match_linear(node, facts)) is not None]
    try:
        down, end = match_end(branch, linears, found, facts)
    except Refused:  # something else than a linear layer ends it: then there is nothing to refit
        return None
    if end.no_module:  # nor where a norm follows it
        return None
    deep: set[fx.Node] = set()
    for node in sorted(found.nodes, key=facts.order.__getitem__):
        if not deep.isdisjoint(node.all_input_nodes) or mixes_tokens(node, facts):
            deep.add(node)
        elif match_linear(node, facts) is not None:
            deep.update(node.users)
    return down, end.steps, tuple(linear for linear in linears if linear.node not in deep)


def find_projections(
    model: nn.Module, graph: TracedGraph, recipe: FuseRecipe | None, *, has_removed: bool = True
) -> list[Projection]:
    """Every layer of a model that could be refitted, in order. `recipe`: how the model was fused, if it was.
    `has_removed`: whether the reference has the layers that the model lost as a whole.

    Layers whose weight is computed, or shared with another place, are left out.
    """
    name_of = own_names(model, graph)
    groups = joined(recipe)
    found = []
    for place, site in enumerate(sites(graph)):
        layer = site.layer if recipe is None else recipe.kept[site.layer]
        weight = name_of(site.linear.weight)
        group = groups.get((site.kind, layer))
        if weight is None:
            if group is not None:
                raise SurgeryError(f"{group.home.name}: the weight of its last linear layer is no parameter of its own")
            continue
        bias = name_of(_bias_of(site))
        if group is not None and all(member.down.bias is None for member in group.members):
            bias = None  # the members' shifts: no member could take over what a refit makes of their sum
        last = layer if group is None else max(group.layers)
        until = _until(last, recipe) if has_removed and site.kind == "ffn" else last
        found.append(
            Projection(
                kind=site.kind,
                layer=layer,
                until=until,
                replaces=until > last,
                members=() if group is None else tuple(sorted(group.layers)),
                place=place,
                weight=weight,
                bias=bias,
                transposed=site.linear.transposed,
                width=site.linear.in_features,
                hidden=site.linear.out_features,
            )
        )
    missing = groups.keys() - {(one.kind, one.layer) for one in found if one.members}
    if missing:
        raise SurgeryError(f"{groups[min(missing)].home.name}: no linear layer ends it in the fused model's graph")
    return found


def _until(layer: int, recipe: FuseRecipe | None) -> int:
    """The last of the layers right behind this one that were removed, or this one (arXiv 2505.02819)."""
    gone = () if recipe is None else recipe.gone
    while layer + 1 in gone:
        layer += 1
    return layer


def own_names(model: nn.Module, graph: TracedGraph) -> Callable[[fx.Node | None], str | None]:
    """The name of the parameter that a node is; None for what is computed, or stands in another place too."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)

    def name_of(node: fx.Node | None) -> str | None:
        value = None if node is None else graph.captured.values.get(node.name)
        own = names.get(id(value), [])
        return own[0] if len(own) == 1 else None

    return name_of


def linears_of(model: nn.Module, graph: TracedGraph) -> dict[str, Linear]:
    """The linear layers of a graph, by the name of their weight; those left out whose weight is read twice."""
    facts = GraphFacts(graph.captured.module.graph, graph.captured.weights)
    name_of = own_names(model, graph)
    found: dict[str, list[Linear]] = {}
    for node in graph.captured.module.graph.nodes:
        linear = match_linear(node, facts)
        name = None if linear is None else name_of(linear.weight)
        if linear is not None and name is not None:
            found.setdefault(name, []).append(linear)
    return {name: linears[0] for name, linears in found.items() if len(linears) == 1}


def joined(recipe: FuseRecipe | None) -> dict[tuple[Kind, int], GroupRecipe]:
    """What is wide in a fused model, by kind and by the layer that holds it."""
    if recipe is None:
        return {}
    found: dict[tuple[Kind, int], GroupRecipe] = {("ffn", group.home.layer): group for group in recipe.groups}
    return found | {("attention", layer): group for layer, group in recipe.attentions.items()}


def _bias_of(site: Site) -> fx.Node | None:
    """The layer's bias, also where it is added by one more operation."""
    if site.linear.bias is not None or not site.tail or site.tail[0][0] != "add":
        return site.linear.bias
    step = site.tail[0][1]
    value = ops.tensor_value(step) if isinstance(step, fx.Node) else None
    is_vector = value is not None and value.dim() == 1 and value.numel() == site.linear.out_features
    return step if isinstance(step, fx.Node) and is_vector else None


def choose(
    found: Sequence[Projection], dropped: Sequence[int], later: str, everywhere: bool = False
) -> list[Projection]:
    """Which of them to refit. `later`: "none" (the groups alone, attention of wide blocks included), "ffn" (every FFN
    from the first layer that was changed on), "all" (attention too). `dropped`: layers of which the reference has
    something, attention or all, and the model has not. `everywhere`: those before the first change as well."""
    groups = [one for one in found if one.members]
    changed = [*dropped, *(one.members[0] for one in groups)]
    if later == "none" or not changed:
        return groups
    first = 0 if everywhere else min(changed)
    # What stands in for removed layers comes before them.
    # Attention that went before the FFNs of its window has a stream without them: the reference has none like it.
    moved = {layer for group in groups for layer in group.members[1:]}
    attention = (one for one in found if one.kind == "attention" and one.layer not in moved and later == "all")
    wanted = {one.place for one in (*attention, *groups, *(one for one in found if one.kind == "ffn"))}
    return [one for one in found if (one.layer >= first or one.replaces) and one.place in wanted]


@dataclass(frozen=True, slots=True)
class Target:
    """What a stream should be: the sum of some of the reference's values, less others. `keep`: from which the rest of
    the reference can be computed."""

    plus: tuple[fx.Node, ...]
    minus: tuple[fx.Node, ...]
    keep: fx.Node


def target_of(projection: Projection, reference: TracedGraph) -> Target:
    """The reference's stream that the model's stream after the projection should be.

    After the attention of a wide block: the stream before the first of its layers, and what the attention of each of
    them adds to the reference's stream. The reference has no such stream itself, with FFNs in between.
    """
    if projection.kind == "attention":
        found = reference.blocks.mixers_of(projection.members or [projection.until])
    else:
        found = tuple(block for block in reference.blocks.layers if block.layer == projection.until)
    if len(found) != (len(projection.members) if projection.kind == "attention" and projection.members else 1):
        raise SurgeryError(f"the reference model has no one stream after {projection.kind} {projection.until}")
    keep = found[0].before if len(found) > 1 else found[0].after  # the FFNs of a window come after all its attention
    return Target(tuple(block.after for block in found), tuple(block.before for block in found[1:]), keep)


def scale_of(site: Site, graph: TracedGraph, inputs: object) -> Tensor | float:
    """What the layer's result is multiplied by before it enters the stream: one number, or `[hidden]`."""
    scale: Tensor | float = 1.0
    for kind, step in site.tail:
        if kind == "mul":
            value = graph.run(inputs, keep=[step])[step].reshape(-1).float() if isinstance(step, fx.Node) else step  # type: ignore[arg-type]
            scale = scale * value
    return scale
