"""What a step computes, one sublayer after another, and how a plan rearranges it.

    table                    A4  4  4  -  4  A4       A: attention, 4: an FFN of width 4, -: padding
    as it is                 A 4 4 4 4 A 4
    a group of layers 1-4    A 4 [12] A 4             padding inside changes nothing
    the same as a window     with mixers between the members: they go first, each on its own or as one

Each sublayer is one branch that is added to the residual stream: one norm, and under tensor parallelism one all-reduce.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxfusion.cost.layer_table import LayerTable
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import MixerMode

_GRAIN = 256  # channels: the multiple that equal parts of a width keep where the width has it
_LAST_NUMBER = re.compile(r".*\.(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of `layers`, its heads side by side. `merged`: how many attentions read this one stream.

    `window`: tokens that it reaches back, None: all. `beside`: attentions of another kind (window, size of heads) that
    read the same stream: one GEMM begins them all, and one ends them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    merged: int = 1
    beside: tuple[Attention, ...] = ()
    layers: tuple[int, ...] = field(default=(), compare=False)

    @property
    def kinds(self) -> tuple[Attention, ...]:
        """This one and those beside it: an attention kernel for each."""
        return (self, *self.beside)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """One FFN of `layers`. `members`: how many FFNs it was made of here; `gated`: three matrices, not two."""

    width: int
    gated: bool = True
    members: int = 1
    layers: tuple[int, ...] = field(default=(), compare=False)


Sublayer = Attention | Ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedWindow:
    """Layers whose mixers go before their FFNs. `before`, `after`: sublayers of them, as they were and as they are.

    Under tensor parallelism each is one all-reduce: 2n for n layers, n + 1 where the mixers are hoisted, 2 where they
    are wide.
    """

    layers: tuple[int, ...]
    mixers: MixerMode
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """All that one forward pass computes: the sublayers in order, and what stands around them.

    `windows`: the groups whose mixers moved.
    """

    name: str
    hidden: int
    vocabulary: int | None
    tied: bool
    sublayers: tuple[Sublayer, ...]
    windows: tuple[MovedWindow, ...] = ()

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(part for part in self.sublayers if isinstance(part, Attention))

    @property
    def ffns(self) -> tuple[Ffn, ...]:
        return tuple(part for part in self.sublayers if isinstance(part, Ffn))


def arrange(
    table: LayerTable,
    plan: FusionPlan | None = None,
    groups: Iterable[Sequence[int | str]] = (),
    unfuse: Mapping[int, int] | None = None,
) -> Step:
    """The sublayers of a model, with attention dropped, layers removed and FFNs fused as a plan says.

    `groups`: besides those of the plan. `unfuse`: layers whose FFN is split into so many (nearly) equal ones first.
    A layer is its position in the table, padding included. Raises `OptionError` that names the layer.
    """
    dropped = () if plan is None else plan.dropped_attention
    removed = () if plan is None else plan.removed
    wanted = [_numbered(group) for group in (*(() if plan is None else plan.groups), *groups)]
    _check_layers(table, [*dropped, *removed, *(layer for group in wanted for layer in group.layers)])
    _check_apart(wanted)
    parts = _parts(table, frozenset(dropped), dict(unfuse or {}))
    for layer in removed:
        if not parts[layer]:
            raise OptionError(f"layer {layer}: there is nothing to remove, the layer is padding")
        parts[layer] = []
    windows = [_fuse(parts, group) for group in wanted]
    return Step(
        name=table.name,
        hidden=table.hidden_size,
        vocabulary=table.vocab_size,
        tied=table.tie_word_embeddings,
        sublayers=tuple(part for layer in parts for part in layer),
        windows=tuple(window for window in windows if window is not None),
    )


def equal_parts(width: int, count: int) -> tuple[int, ...]:
    """A width as a sum of so many: equal up to one grain, the largest power of two up to 256 that divides it."""
    grain = math.gcd(width, _GRAIN)
    grain = grain if width // grain >= count else 1
    each, more = divmod(width // grain, count)
    return tuple((each + (index < more)) * grain for index in range(count))


@dataclass(frozen=True, slots=True)
class _Group:
    layers: tuple[int, ...]
    mixers: MixerMode

    def __str__(self) -> str:
        return f"group {self.layers[0]}-{self.layers[-1]}"


def _numbered(group: Sequence[int | str]) -> _Group:
    """The group with layer numbers in place of module paths (the last number in a path is its layer)."""
    numbers: list[int] = []
    for member in group:
        if isinstance(member, str):
            found = _LAST_NUMBER.match(f".{member}")
            if found is None:
                raise OptionError(f"group member {member!r}: no layer number in it")
            member = int(found[1])
        numbers.append(member)
    if not numbers:
        raise OptionError("a group without layers")
    return _Group(tuple(sorted(numbers)), getattr(group, "mixers", "none"))


def _check_layers(table: LayerTable, layers: Iterable[int]) -> None:
    count = len(table.layers)
    for layer in layers:
        if not 0 <= layer < count:
            raise OptionError(f"layer {layer} does not exist: {table.name} has {count} layers, counted from 0")


def _check_apart(groups: Sequence[_Group]) -> None:
    seen: set[int] = set()
    for group in groups:
        twice = seen.intersection(group.layers)
        if twice or len(set(group.layers)) < len(group.layers):
            raise OptionError(f"{group}: a layer of it is named twice, or in another group too")
        seen.update(group.layers)


def _parts(table: LayerTable, dropped: frozenset[int], unfuse: dict[int, int]) -> list[list[Sublayer]]:
    """The sublayers of each layer."""
    _check_layers(table, unfuse)
    found: list[list[Sublayer]] = []
    for number, layer in enumerate(table.layers):
        parts: list[Sublayer] = []
        if layer.has_mixer and number not in dropped:
            parts.append(_attention(table, number))
        elif number in dropped and not layer.has_mixer and layer.ffn_width is None:
            raise OptionError(f"layer {number}: there is no attention to drop, the layer is padding")
        if layer.ffn_width is not None:
            widths = _split(number, layer.ffn_width, unfuse[number]) if number in unfuse else (layer.ffn_width,)
            parts += [Ffn(width=width, gated=table.gated, layers=(number,)) for width in widths]
        elif number in unfuse:
            raise OptionError(f"unfuse: layer {number} has no FFN")
        found.append(parts)
    return found


def _split(layer: int, width: int, count: int) -> tuple[int, ...]:
    if not 1 <= count <= width:
        raise OptionError(f"unfuse: layer {layer}: expected 1 to {width} members (its FFN's channels), got {count}")
    return equal_parts(width, count)


def _attention(table: LayerTable, number: int) -> Attention:
    heads = table.num_attention_heads
    if heads is None:
        raise OptionError(f"{table.name}: num_attention_heads is not known, and layer {number} has attention")
    layer = table.layers[number]
    kv_heads = layer.num_key_value_heads or table.num_key_value_heads or heads
    head_dim = table.head_dim or table.hidden_size // heads
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=layer.window, layers=(number,))


def _fuse(parts: list[list[Sublayer]], group: _Group) -> MovedWindow | None:
    """Puts the group's FFN where its first member stood, and the mixers of a window before it."""
    first, last = group.layers[0], group.layers[-1]
    span = [(layer, part) for layer in range(first, last + 1) for part in parts[layer]]
    members = _members(span, group)
    mixers = [part for _, part in span if isinstance(part, Attention)]
    between = [layer for layer, part in span[1:] if isinstance(part, Attention)]
    if between and group.mixers == "none":
        raise OptionError(
            f"{group}: the attention of layer {between[0]} lies between its FFNs; drop it, or let the group move it "
            "(mixers: hoist or wide)"
        )
    wide = replace(
        members[0],
        width=sum(part.width for part in members),
        members=len(members),
        layers=tuple(dict.fromkeys(layer for part in members for layer in part.layers)),
    )
    for layer in range(first, last + 1):
        parts[layer] = []
    parts[first] = [*(_merged(mixers) if group.mixers == "wide" else mixers), wide]
    if not between:
        return None  # it has no mixers that move
    return MovedWindow(layers=group.layers, mixers=group.mixers, before=len(span), after=len(parts[first]))


def _members(span: Sequence[tuple[int, Sublayer]], group: _Group) -> list[Ffn]:
    """The FFNs that become one. Raises `OptionError` where others stand between them, or they are too few."""
    members = []
    for layer, part in span:
        if isinstance(part, Ffn):
            if layer not in group.layers:
                raise OptionError(f"{group}: layer {layer} lies between its members and is none of them")
            members.append(part)
    if len(members) < 2:
        plural = "" if len(members) == 1 else "s"
        raise OptionError(f"{group}: it has {len(members)} FFN{plural}; a group needs at least two")
    return members


def _merged(mixers: Sequence[Attention]) -> list[Attention]:
    """Attentions that read one stream, as one sublayer: heads side by side where they are alike, else in kinds."""
    found: dict[tuple[int, int | None], list[Attention]] = {}
    for part in mixers:
        found.setdefault((part.head_dim, part.window), []).append(part)
    kinds = [
        replace(
            alike[0],
            heads=sum(part.heads for part in alike),
            kv_heads=sum(part.kv_heads for part in alike),
            merged=len(alike),
            layers=tuple(layer for part in alike for layer in part.layers),
        )
        for alike in found.values()
    ]
    layers = tuple(layer for part in mixers for layer in part.layers)
    return [replace(kinds[0], beside=tuple(kinds[1:]), layers=layers)] if kinds else []
