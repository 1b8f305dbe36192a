"""Read off a captured graph how the attentions of a wide window become one attention with the heads of all.

Before:  q_i [heads * d, hidden], k_i, v_i [kv_heads * d, hidden], o_i [hidden, heads * d]     in layers i, i + 1, ...
After:   q = rows of all q_i * g_i, k and v likewise; o = columns of all o_i                   in the last one's modules

The same records as for FFNs: projections, pieces and a last projection. Raises `SurgeryError` where one attention
cannot compute what the members do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxfusion.errors import Refused, SurgeryError
from fxfusion.graph import ops
from fxfusion.models import cache_slots
from fxfusion.models.attention_sites import find_sites
from fxfusion.models.drop_record import read_record
from fxfusion.models.ffn_surgery.depth import FOLLOWS_SLOTS, are_layers
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Cut, Member
from fxfusion.models.ffn_surgery.read_layout import LayoutReader
from fxfusion.models.ffn_surgery.snapshot import plain_attributes
from fxfusion.models.traced import TracedGraph
from fxfusion.passes.check_group import fold_roles
from fxfusion.passes.ffn import Group, Matches, Mixer, Role
from fxfusion.passes.match_heads import MixerHeads, check_alike, match_heads
from fxfusion.passes.match_mixer import match_mixer
from fxfusion.passes.parallelise_mixers import mixers_of
from fxfusion.passes.prove_norm import NormProver


def wide_mixers(group: Group, matches: Matches, traced: TracedGraph) -> dict[int, Mixer]:
    """The mixers of a wide window, in order, by decoder layer; none of another group."""
    if group.window is None or group.window.names.mixers != "wide":
        return {}
    numbers = {block.after: block.layer for block in traced.blocks.mixers}
    found = mixers_of(group.window, matches)
    lost = [mixer.layer or mixer.add.name for mixer in found if mixer.add not in numbers]
    if lost:
        raise SurgeryError(f"{lost[0]} belongs to no numbered decoder layer")
    return {numbers[mixer.add]: mixer for mixer in found}


def attention_recipe(reader: LayoutReader, mixers: Mapping[int, Mixer]) -> GroupRecipe:
    """How the parameters of some attentions become those of one, in the modules of the last.

    `mixers`: by decoder layer, in order. Gains of their norms are folded, whatever the plan says of the FFNs' norms:
    each attention keeps its own.
    """
    layers = [*mixers][::-1]
    try:
        heads = [_heads(reader, mixers[layer]) for layer in layers]
        check_alike(heads)
        roles = fold_roles([one.ends for one in heads], NormProver())
    except Refused as refused:
        where = f"the attentions of layers {sorted(layers)} cannot be joined (mixers: wide)"
        raise SurgeryError(f"{where}: {refused.message}; torch.compile with the same plan needs no module") from None
    members = tuple(_member(reader, one, layer, roles, heads) for one, layer in zip(heads, layers, strict=True))
    counts = (*heads[0].counts, heads[0].out_count)
    return reader.joined(heads[0].ends, members, heads[0].constants, norm="fold", mixers="wide", heads=counts)


def _heads(reader: LayoutReader, mixer: Mixer) -> MixerHeads:
    opaque = reader.traced.captured.opaque
    return match_heads(match_mixer(mixer, mixer.stream, reader.facts, opaque, loose=True), reader.facts)


def _member(
    reader: LayoutReader, one: MixerHeads, layer: int, roles: tuple[Role, ...], all_: Sequence[MixerHeads]
) -> Member:
    ends = one.ends
    return Member(
        layer=layer,
        name=ends.name,
        width=ends.width,
        projections=tuple(reader.matrix(ends, linear) for linear in ends.projections),
        cuts=tuple(Cut(piece.projection, piece.start, piece.stop, piece.step) for piece in one.pieces),
        down=reader.matrix(ends, ends.down),
        prologue=tuple(reader.constant(ends, node) for node in ends.prologue_constants),
        roles=roles,
        middle=(),
        tail=reader.tail(ends, ends.end.steps),
        per_head=tuple(
            _per_head(reader, one, node)
            for index, node in enumerate(one.constants)
            if len({other.constants[index] for other in all_}) > 1
        ),
    )


def _per_head(reader: LayoutReader, one: MixerHeads, node: fx.Node) -> tuple[str, int]:
    """The parameter of a gain that all heads of a member share, and how many they are: in one attention for all
    members every head has its own."""
    constant, value = reader.constant(one.ends, node), ops.tensor_value(node)
    shapes = [None if ops.op_name(user) not in ("mul", "add") else ops.tensor_value(user) for user in node.users]
    counts = {shape.shape[-2] if shape is not None and shape.dim() > 2 else None for shape in shapes}
    count = counts.pop() if len(counts) == 1 else None
    if count not in one.counts or value is None or value.dim() != 1 or len(constant.names) != 1:
        raise SurgeryError(
            f"{one.ends.name}: {', '.join(constant.names)} differs between the attentions of a wide window and is no "
            "gain that every head could have for itself"
        )
    return constant.names[0], int(count or 0)


def check_wide_layers(model: nn.Module, recipe: GroupRecipe, traced: TracedGraph, path: str, count: int) -> None:
    """Raises `SurgeryError` where something else than weights would be lost with the layers of some attentions:
    parameters that no wide layer takes, or numbers that differ and that a short run does not show, such as the length
    of a sliding window. `recipe`: of the attentions; `path`: of the list of decoder layers, `count` of them."""
    layers = recipe.layers
    sites = find_sites(traced, layers)
    modules = {
        layer: [part for name in sites[layer].attention for part in model.get_submodule(name).modules()]
        for layer in layers
    }
    _check_attributes(model, path, layers, modules)
    _check_config(model, path, count, layers)


def check_parameters(model: nn.Module, parts: Sequence[GroupRecipe], path: str) -> None:
    """Raises `SurgeryError` where a layer that goes has a parameter which no wide layer takes. `parts`: the FFN and
    the attention of a wide window."""
    read = {name for part in parts for name in part.reads}
    for layer in set(parts[-1].layers) & set(parts[0].removed):
        for name, _ in model.get_submodule(f"{path}.{layer}").named_parameters(f"{path}.{layer}"):
            if name not in read:
                raise SurgeryError(f"{name} is no part of what becomes wider (mixers: wide), and would be lost")


def _check_attributes(
    model: nn.Module, path: str, layers: Sequence[int], modules: Mapping[int, Sequence[nn.Module]]
) -> None:
    first = layers[0]
    own = _with_layer(model, path, first, modules)
    for layer in layers[1:]:
        others = _with_layer(model, path, layer, modules)
        kinds = [[type(part).__name__ for part in parts] for parts in (own, others)]
        if kinds[0] != kinds[1]:
            raise _differs("what they are made of", first, layer, *kinds)
        for one, other in zip(own, others, strict=True):
            mine, theirs = plain_attributes(one), plain_attributes(other)
            for name in sorted({*mine, *theirs}):
                if mine.get(name) != theirs.get(name) and not _is_number_of(name, mine.get(name), theirs.get(name)):
                    raise _differs(f"{name} of {type(one).__name__}", first, layer, mine.get(name), theirs.get(name))


def _check_config(model: nn.Module, path: str, count: int, layers: Sequence[int]) -> None:
    record = read_record(getattr(model, "config", None))
    for config in cache_slots.decoder_configs(model, path, count):
        lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
        types = getattr(config, "layer_types", None) if record is None else record.layer_types
        by_layer = {name: value for name, value in lists.items() if name not in FOLLOWS_SLOTS} | {"layer_types": types}
        for name, value in by_layer.items():
            _check_list(name, value, count, layers)


def _check_list(name: str, value: Any, count: int, layers: Sequence[int]) -> None:
    """A list of a config with an entry for each layer, or of the numbers of layers."""
    if are_layers(name, value, count):
        value = [layer in value for layer in range(count)]
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return
    for layer in layers[1:]:
        if value[layer] != value[layers[0]]:
            raise _differs(f"config.{name}", layers[0], layer, value[layers[0]], value[layer])


def _differs(what: str, first: int, other: int, one: object, two: object) -> SurgeryError:
    return SurgeryError(
        f"the attentions of layers {first} and {other} cannot be joined (mixers: wide): {what} is {one!r} in one and "
        f"{two!r} in the other"
    )


def _with_layer(model: nn.Module, path: str, layer: int, modules: Mapping[int, Sequence[nn.Module]]) -> list[nn.Module]:
    return [model.get_submodule(f"{path}.{layer}"), *modules[layer]]


def _is_number_of(name: str, one: object, other: object) -> bool:
    """Whether it is how a module knows its layer, or its place in the cache."""
    return cache_slots.is_index(name, one) and cache_slots.is_index(name, other)
