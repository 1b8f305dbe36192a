"""The members' parameters out of those of a wide FFN: `group_recipe` backwards.

Before:  W [sum of widths, hidden], gains folded in
After:   W_i = rows of W, over g_i                    bit for bit with norm="last", to rounding with norm="fold"

Parameters that were trained since they were fused give members whose parallel form computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe, through
from fxfusion.models.ffn_surgery.layout import Constant, Matrix, wide_dtype
from fxfusion.models.ffn_surgery.residue import kept_columns, kept_rows

_NOTHING = 64  # times the dtype's epsilon: a bias that is no more than this is none


@dataclass(slots=True)
class Unpacking:
    """One group on its way back. `wide`: fused parameters by the first member's names; `residue`: see `residue.py`.

    `recorded`: the members' small parameters as they were; `small`: as they must be now.
    """

    recipe: GroupRecipe
    wide: Mapping[str, Tensor]
    residue: Mapping[str, Tensor]
    recorded: dict[str, Tensor] = field(init=False)
    small: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        example = self.wide[self.recipe.home.down.weight]
        names = [name for member in self.recipe.members for name in member.small]
        self.recorded = {name: _like(self.residue[name], example) for name in names}
        self.small = dict(self.recorded)

    @torch.no_grad()
    def check(self) -> None:
        """Raises `SurgeryError` where training has made something that no members can be."""
        self._take_training()
        for place, member in enumerate(self.recipe.members):
            for number in range(len(member.projections) if self.recipe.in_bias else 0):
                self._in_bias(place, number, self._rows(place, number))

    @torch.no_grad()
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values, one after the other. Raises `SurgeryError` where no members compute the same."""
        self._take_training()
        for place, member in enumerate(self.recipe.members):
            for number, matrix in enumerate(member.projections):
                rows = self._rows(place, number)
                yield matrix.weight, _stored(matrix, rows)
                self._in_bias(place, number, rows)
            yield member.down.weight, _stored(member.down, self._down(place))
        yield from self.small.items()

    def _rows(self, place: int, number: int) -> Tensor:
        member, home = self.recipe.members[place], self.recipe.home.projections[number]
        whole = home.out_in(self.wide[home.weight])
        pieces = sum(cut.projection == number for cut in member.cuts)
        rows = whole.new_empty(pieces * member.width, whole.shape[1])
        for target, source in self.recipe.slices(number, place):
            rows[source] = whole[target]
        gains = [constant.value(self.recorded).reshape(-1) for constant in member.with_role("gain")]
        for gain in gains:
            rows = _divided(rows, gain)
        columns = kept_columns(self.residue, member.projections[number].weight)
        if columns is not None:
            dead = torch.stack(torch.broadcast_tensors(*(gain == 0 for gain in gains))).any(0)
            rows[:, dead.expand(rows.shape[1])] = _like(columns, rows)
        return rows

    def _in_bias(self, place: int, number: int, rows: Tensor) -> None:
        """The member's part of a projection's bias, without what the norm's shift put there."""
        member, home = self.recipe.members[place], self.recipe.home.projections[number]
        if not self.recipe.in_bias:
            return
        dtype = wide_dtype(rows)
        bias = torch.empty(rows.shape[0], dtype=dtype, device=rows.device)
        for target, source in self.recipe.slices(number, place):
            bias[source] = self.wide[home.own_bias][target].to(dtype)
        own = member.projections[number].bias
        scale = bias.abs().max()
        for shift in member.with_role("shift"):
            bias = bias - through(rows, shift, self.recorded)
        if own is not None:
            self.small[own] = bias.to(rows.dtype)
        elif bool(bias.abs().max() > _NOTHING * torch.finfo(rows.dtype).eps * scale):
            raise SurgeryError(f"{home.own_bias} was trained since it was fused, and {member.name} has no such bias")

    def _down(self, place: int) -> Tensor:
        member, home = self.recipe.members[place], self.recipe.home.down
        columns = self.recipe.own_columns(place, home.out_in(self.wide[home.weight]))
        scale = self.recipe.scale(member, self.recorded, columns)
        if scale is None:
            return columns
        columns = _divided(columns.t(), scale).t()
        rows = kept_rows(self.residue, member.down.weight)
        if rows is not None:
            columns[scale == 0] = _like(rows, columns)
        return columns

    def _take_training(self) -> None:
        """What the small parameters of the fused FFN became since, handed to the members'."""
        recipe = self.recipe
        for name, source in recipe.copies:
            self.small[source] = self.wide[name].clone()
        for index, constant in enumerate(recipe.home.middle):
            if constant is not None:
                self._middle(index, self.wide[constant.names[0]])
        fills = dict(recipe.fills)
        for role, own in (("gain", self._scale_constants), ("shift", self._shift_norms)):
            for index, constant in enumerate(recipe.home.with_role(role)):
                own(role, index, constant, fills[constant.names[0]])
        for kind, step in recipe.home.tail:
            if isinstance(step, Constant) and not _is_filled(self.wide[step.names[0]], fills[step.names[0]]):
                raise SurgeryError(f"{step.names[0]} was trained since it was fused; its {kind} cannot be shared out")
        if recipe.down_bias:
            self._down_bias()

    def _middle(self, index: int, values: Tensor) -> None:
        for place, member in enumerate(self.recipe.members):
            constant = member.middle[index]
            assert constant is not None
            name, own = constant.names[0], self.recipe.own_columns(place, values.reshape(-1))
            if self.recorded[name].numel() == 1:
                if not bool((own == own[0]).all()):
                    raise SurgeryError(f"{name} was one number, and training since has made it one per channel")
                own = own[:1]
            self.small[name] = own.reshape(self.recorded[name].shape).clone()

    def _scale_constants(self, role: str, index: int, home: Constant, fill: float) -> None:
        """A gain that was one, and is `now`: every member's gain times it. A constant is its parameter plus `rest`."""
        now, rest = self.wide[home.names[0]], 1.0 - fill
        if _is_filled(now, fill):
            return
        for member in self.recipe.members:
            name = member.with_role(role)[index].names[0]
            self.small[name] = (self.recorded[name] + rest) * (now + rest) - rest

    def _shift_norms(self, role: str, index: int, home: Constant, fill: float) -> None:
        """A shift that was zero: every member's own, and the new one through its gain."""
        now = self.wide[home.names[0]] - fill
        if _is_filled(now, 0.0):
            return
        for member in self.recipe.members:
            name = member.with_role(role)[index].names[0]
            for gain in member.with_role("gain"):
                now = now * gain.value(self.recorded).reshape(-1)
            self.small[name] = self.recorded[name] + now
            now = self.wide[home.names[0]] - fill

    def _down_bias(self) -> None:
        """What the sum of biases gained goes to one member that has one."""
        recipe = self.recipe
        down = recipe.home.down.out_in(self.wide[recipe.home.down.weight])
        change = self.wide[recipe.home.down.own_bias] - recipe.down_bias_of(self.recorded, down)
        if not bool(change.any()):
            return
        owners = [member for member in recipe.members if member.down.bias is not None and not member.tail]
        if not owners:
            wanted = recipe.home.down.own_bias
            raise SurgeryError(f"{wanted} was trained since it was fused, and no member has such a bias")
        name = owners[0].down.bias
        assert name is not None
        self.small[name] = self.recorded[name] + change * recipe.home.kept_scale


def _is_filled(value: Tensor, fill: float) -> bool:
    return bool((value == fill).all())


def _stored(matrix: Matrix, out_in: Tensor) -> Tensor:
    """A weight as its layer keeps it, with memory of its own."""
    return matrix.out_in(out_in).contiguous()


def _like(value: Tensor, example: Tensor) -> Tensor:
    return value.to(device=example.device, dtype=example.dtype if value.is_floating_point() else value.dtype)


def _divided(rows: Tensor, gain: Tensor) -> Tensor:
    """`[n, hidden]` over `[hidden]` in float32 or wider; zero where the divisor is."""
    dtype = wide_dtype(rows)
    divisor = torch.where(gain == 0, torch.ones_like(gain), gain).to(dtype)
    divided = rows.to(dtype) / divisor
    return divided.masked_fill(gain == 0, 0.0).to(rows.dtype)
