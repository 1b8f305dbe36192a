"""How one group's parameters become those of one wide FFN.

Before:  Wg_i [width_i, hidden], g_i [hidden], Wd_i [hidden, width_i], scale_i [hidden]      in layers i, i + 1, ...
After:   Wg = rows of all Wg_i * g_i;  Wd = columns of all scale_i * Wd_i                    in the first member's layer
         its gain 1 (norm="fold"), or the last member's (norm="last")

The order of intermediate channels does not matter to an FFN, as long as gate, up and down agree. It matters to tensor
parallelism, which cuts the wide FFN into equal runs of channels: with as many shards as devices, each device holds a
slice of every member.

    shards=1:  all of member 0, all of member 1, ...
    shards=2:  first halves of members 0, 1, ...; then their second halves

Exact: the same fold as `fxfusion.passes.build_wide`, for parameters instead of graph nodes.
Source: arXiv 2503.18908, theorem 3.1 and section 5.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxfusion.models.ffn_surgery import quantised
from fxfusion.models.ffn_surgery.layout import Constant, Matrix, Member, Tensors, wide_dtype
from fxfusion.plan.fusion_plan import MixerMode, PlannedGroup
from fxfusion.plan.policy import NormMode

_CHUNK = 1 << 18  # numbers that are folded at a time: what an allocator keeps of larger ones would add up


@dataclass(frozen=True, slots=True)
class Run:
    """Channels `own : own + length` of a member, at `wide : wide + length` in the wide FFN."""

    wide: int
    own: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecipe:
    """`fills`: parameters of the first member that become one number; `copies`: those that take another parameter's
    values (first member's name, source). `in_bias`, `down_bias`: whether the wide layers have biases. `shards`: into
    how many equal parts the wide FFN can be cut, each with a slice of every member. `mixers`: as in the plan. Where
    they were hoisted (a window) the last layer's FFN becomes the wide one, and is the first of `members`; the other
    layers stay, without their FFNs. In a wide window they go, and the last attention becomes the wide one: such a
    recipe may be of attentions too (`read_attention.py`); `heads` is how many each piece of a member has then, and
    those that its last projection reads.

    All names are those of the unfused model; the wide parameters take the first member's.
    """

    members: tuple[Member, ...]
    norm: NormMode
    fills: tuple[tuple[str, float], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    in_bias: bool = False
    down_bias: bool = False
    shards: int = 1
    mixers: MixerMode = "none"
    heads: tuple[int, ...] = ()
    _runs: list[tuple[Run, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_runs", spread([member.width for member in self.members], self.shards))

    @property
    def home(self) -> Member:
        """The member whose modules become wider: the first."""
        return self.members[0]

    @property
    def is_window(self) -> bool:
        return self.mixers != "none"

    @property
    def width(self) -> int:
        return sum(member.width for member in self.members)

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all members, the home's first."""
        return tuple(member.layer for member in self.members)

    @property
    def removed(self) -> tuple[int, ...]:
        """Layers that go, since nothing is left of them."""
        return () if self.mixers == "hoist" else self.layers[1:]

    @property
    def planned(self) -> PlannedGroup:
        """The group as a plan names it."""
        return PlannedGroup(sorted(self.layers), self.mixers)

    @property
    def reads(self) -> tuple[str, ...]:
        """Every parameter that goes into the wide FFN."""
        return tuple(name for member in self.members for name in (*member.large, *member.small))

    @property
    def writes(self) -> tuple[str, ...]:
        """Parameters of the first member that get new values, some of them a new shape."""
        home = self.home
        biases = [matrix.own_bias for matrix in home.projections if self.in_bias]
        biases += [home.down.own_bias] if self.down_bias else []
        middle = [constant.names[0] for constant in home.middle if constant is not None]
        names = [*home.large, *biases, *middle, *(name for name, _ in (*self.fills, *self.copies, *home.per_head))]
        return tuple(dict.fromkeys(names))

    @torch.no_grad()
    def pack(self, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """The values of `writes`, one after the other. Each of `reads` is taken from `tensors` when it is needed."""
        for number, matrix in enumerate(self.home.projections):
            yield matrix.weight, self._projection(tensors, number)
            if self.in_bias:
                yield matrix.own_bias, self._projection_bias(tensors, number)
        yield self.home.down.weight, self._down(tensors)
        if self.down_bias:
            yield (
                self.home.down.own_bias,
                self.down_bias_of(tensors, self.home.down.out_in(tensors[self.home.down.weight])),
            )
        yield from self._small(tensors)

    def _small(self, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        for index, constant in enumerate(self.home.middle):
            if constant is not None:
                yield constant.names[0], self._middle(tensors, index)
        for index, (name, _) in enumerate(self.home.per_head):
            yield name, self._per_head(tensors, index)
        for name, fill in self.fills:
            yield name, torch.full_like(tensors[name], fill)
        for name, source in self.copies:
            yield name, tensors[source].detach().clone()

    def _projection(self, tensors: Tensors, number: int) -> Tensor:
        """Rows of every member, gains folded in: `[pieces * width, hidden]`, stored as the first member's is."""
        matrix = self.home.projections[number]
        if quantised.is_quantised(tensors[matrix.weight]):
            weights = [tensors[member.projections[number].weight] for member in self.members]
            places = [self.slices(number, place) for place in range(len(self.members))]
            return quantised.joined(weights, places, 0, self._rows(number))
        stored = _empty_like(tensors[matrix.weight], matrix, self._rows(number))
        wide = matrix.out_in(stored)
        for place, member in enumerate(self.members):
            weight = member.projections[number].out_in(tensors[member.projections[number].weight])
            gains = [constant.value(tensors).reshape(-1) for constant in member.with_role("gain")]
            for target, source in self.slices(number, place):
                _fold(wide[target], weight[source], gains)
        return stored

    def _projection_bias(self, tensors: Tensors, number: int) -> Tensor:
        example = tensors[self.home.projections[number].weight]
        wide = torch.zeros(self._rows(number), dtype=example.dtype, device=example.device)
        for place, member in enumerate(self.members):
            matrix = member.projections[number]
            weight = matrix.out_in(quantised.plain(tensors[matrix.weight]))
            for target, source in self.slices(number, place):
                wide[target] = _shifted(member, matrix, weight[source], source, tensors)
        return wide

    def _down(self, tensors: Tensors) -> Tensor:
        matrix = self.home.down
        example = tensors[matrix.weight]
        if quantised.is_quantised(example):
            places = [self.columns(place) for place in range(len(self.members))]
            return quantised.joined([tensors[m.down.weight] for m in self.members], places, 1, self.width)
        hidden = matrix.out_in(example).shape[0]
        size = (self.width, hidden) if matrix.transposed else (hidden, self.width)
        stored = example.new_empty(size)
        wide = matrix.out_in(stored)
        for place, member in enumerate(self.members):
            weight = member.down.out_in(tensors[member.down.weight])
            scale = self.scale(member, tensors, weight)
            for target, source in self.columns(place):
                _scale_rows(wide[:, target], weight[:, source], scale)
        return stored

    def scale(self, member: Member, tensors: Tensors, down: Tensor) -> Tensor | None:
        """What the rows of a member's down projection `[hidden, width]` are multiplied by: `[hidden]`, or None."""
        if not member.tail and not self.home.tail:
            return None
        factor, _ = member.affine(tensors, wide_dtype(down))
        if not isinstance(factor, Tensor):
            if factor == self.home.kept_scale:
                return None
            factor = torch.tensor([factor], dtype=wide_dtype(down), device=down.device)
        return (factor / self.home.kept_scale).expand(down.shape[0])

    def down_bias_of(self, tensors: Tensors, down: Tensor) -> Tensor:
        """The sum of the members' biases and shifts, `[hidden]`, for a down projection `[hidden, width]`."""
        dtype = wide_dtype(down)
        total = torch.zeros(down.shape[0], dtype=dtype, device=down.device)
        for member in self.members:
            scale, shift = member.affine(tensors, dtype)
            if member.down.bias is not None:
                total = total + tensors[member.down.bias].to(dtype) * scale
            total = total + shift
        return (total / self.home.kept_scale).to(down.dtype)

    def _middle(self, tensors: Tensors, index: int) -> Tensor:
        """One value per wide channel."""
        first = self.home.middle[index]
        assert first is not None
        wide = tensors[first.names[0]].new_empty(self.width)
        for place, member in enumerate(self.members):
            constant = member.middle[index]
            assert constant is not None
            values = tensors[constant.names[0]].reshape(-1).expand(member.width)
            for target, source in self.columns(place):
                wide[target] = values[source]
        return wide

    def _per_head(self, tensors: Tensors, index: int) -> Tensor:
        """One row per head, `[heads of all, ...]`."""
        shared = [member.per_head[index] for member in self.members]
        return torch.cat([tensors[name].expand(heads, *tensors[name].shape) for name, heads in shared])

    def _rows(self, number: int) -> int:
        return self.home.rows(number) * self.width // self.home.width

    def slices(self, number: int, place: int) -> list[tuple[slice, slice]]:
        """Where a member's channels of a projection stand in the wide one, and in its own."""
        found = []
        for home, cut in zip(self.home.cuts, self.members[place].cuts, strict=True):
            if cut.projection == number:
                whole = home.widened(self.home.width, self.width)
                width = self.members[place].width
                for run in self._runs[place]:
                    wide, begin, length = (n * cut.length // width for n in (run.wide, run.own, run.length))
                    first, own = whole.start + wide * home.step, cut.start + begin * cut.step
                    target = slice(first, first + length * home.step, home.step)
                    found.append((target, slice(own, own + length * cut.step, cut.step)))
        return found

    def columns(self, place: int) -> list[tuple[slice, slice]]:
        """Where a member's channels stand in the wide down projection, and in its own."""
        return [
            (slice(run.wide, run.wide + run.length), slice(run.own, run.own + run.length)) for run in self._runs[place]
        ]

    def own_columns(self, place: int, wide: Tensor) -> Tensor:
        """A member's channels of `[..., width of all]`, a copy."""
        return torch.cat([wide[..., target] for target, _ in self.columns(place)], dim=-1)


def _empty_like(example: Tensor, matrix: Matrix, rows: int) -> Tensor:
    hidden = matrix.out_in(example).shape[1]
    return example.new_empty((hidden, rows) if matrix.transposed else (rows, hidden))


def _fold(target: Tensor, rows: Tensor, gains: list[Tensor]) -> None:
    if not gains:
        target.copy_(rows)
        return
    dtype, step = wide_dtype(rows), max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].to(dtype)
        for gain in gains:
            part = part * gain.to(dtype)
        target[start : start + step] = part.to(target.dtype)


def _scale_rows(target: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    if scale is None:
        target.copy_(weight)
        return
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step].to(scale.dtype) * scale[start : start + step, None]
        target[start : start + step] = part.to(target.dtype)


def _shifted(member: Member, matrix: Matrix, rows: Tensor, channels: slice, tensors: Tensors) -> Tensor:
    """A projection's bias with the norm's shift moved through its rows."""
    dtype = wide_dtype(rows)
    total = torch.zeros(rows.shape[0], dtype=dtype, device=rows.device)
    if matrix.bias is not None:
        total = tensors[matrix.bias][channels].to(dtype)
    for constant in member.with_role("shift"):
        total = total + through(rows, constant, tensors)
    return total.to(rows.dtype)


def through(rows: Tensor, shift: Constant, tensors: Tensors) -> Tensor:
    """`rows @ shift`, `[rows]`, as the compiler computes it."""
    dtype = wide_dtype(rows)
    vector = shift.value(tensors).reshape(-1).to(dtype)
    step = max(1, _CHUNK // rows.shape[1])
    parts = [(rows[start : start + step].to(dtype) * vector).sum(-1) for start in range(0, rows.shape[0], step)]
    return torch.cat(parts)


def spread(widths: Sequence[int], shards: int) -> list[tuple[Run, ...]]:
    """The runs of each member, in its own order.

    Shards end where equal cuts of the whole do: each `ceil(sum / shards)` channels, the last one shorter, as
    `torch.chunk` and DTensor's `Shard` cut. Each takes of a member what is proportional to its width, rounded.
    """
    total = sum(widths)
    size = -(-total // shards)
    found: list[list[Run]] = [[] for _ in widths]
    wide, begun = 0, [0] * len(widths)
    for end in range(size, total + size, size):
        ended = _share(widths, min(end, total))
        for member, (first, last) in enumerate(zip(begun, ended, strict=True)):
            if last > first:
                found[member].append(Run(wide, first, last - first))
                wide += last - first
        begun = ended
    return [tuple(runs) for runs in found]


def _share(widths: Sequence[int], seats: int) -> list[int]:
    """How many of the first `seats` channels are each member's, in proportion to the widths (Sainte-Lague, so that
    no member's share falls where seats are added)."""
    if seats == sum(widths):
        return list(widths)
    places = torch.cat([(torch.arange(width, dtype=torch.float64) + 0.5) / width for width in widths])
    owners = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    first = owners[places.argsort(stable=True)[:seats]]
    return torch.bincount(first, minlength=len(widths)).tolist()
