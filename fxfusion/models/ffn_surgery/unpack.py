"""The members' parameters out of those of a wide FFN: `group_recipe` backwards.

Before:  W [sum of widths, hidden], gains folded in
After:   W_i = rows of W, over g_i                    bit for bit with norm="last", to rounding with norm="fold"

Parameters that were trained since they were fused give members whose parallel form computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery import quantised
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe, through
from fxfusion.models.ffn_surgery.layout import Matrix, wide_dtype
from fxfusion.models.ffn_surgery.residue import kept_columns, kept_rows, zero_columns, zero_rows
from fxfusion.models.ffn_surgery.trained import SmallParameters, as_like, holds, zeros_of

_NOTHING = 64  # times the dtype's epsilon: a bias that is no more than this is none


@dataclass(slots=True)
class Unpacking:
    """One group on its way back. `wide`: fused parameters by the first member's names; `residue`: see `residue.py`."""

    recipe: GroupRecipe
    wide: Mapping[str, Tensor]
    residue: Mapping[str, Tensor]

    @torch.no_grad()
    def check(self) -> None:
        """Raises `SurgeryError` where training has made something that no members can be."""
        small = SmallParameters(self.recipe, self.wide, self.residue)
        for place, member in enumerate(self.recipe.members):
            for number in range(len(member.projections) if self.recipe.in_bias else 0):
                self._in_bias(small, place, number, self._rows(small, place, number))

    @torch.no_grad()
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values, one after the other. Raises `SurgeryError` where no members compute the same."""
        small = SmallParameters(self.recipe, self.wide, self.residue)
        for place, member in enumerate(self.recipe.members):
            for number, matrix in enumerate(member.projections):
                rows = self._rows(small, place, number)
                yield matrix.weight, _stored(matrix, rows)
                self._in_bias(small, place, number, rows)
            yield member.down.weight, _stored(member.down, self._down(small, place))
        yield from small.now.items()

    def _rows(self, small: SmallParameters, place: int, number: int) -> Tensor:
        member, home = self.recipe.members[place], self.recipe.home.projections[number]
        whole = home.out_in(self.wide[home.weight])
        if quantised.is_quantised(whole):
            return quantised.joined([whole], [_back(self.recipe.slices(number, place))], 0, member.rows(number))
        rows = whole.new_empty(member.rows(number), whole.shape[1])
        for target, source in self.recipe.slices(number, place):
            rows[source] = whole[target]
        gains = small.gains(member)
        for gain in gains:
            rows = _divided(rows, gain)
        columns = kept_columns(self.residue, member.projections[number].weight)
        were = None if columns is None else zero_columns(member, small.recorded, rows.shape[1])
        if columns is not None and were is not None:
            are = zeros_of(gains).expand(rows.shape[1])
            rows[:, are] = as_like(columns, rows)[:, are[were]]
        return rows

    def _in_bias(self, small: SmallParameters, place: int, number: int, rows: Tensor) -> None:
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
            bias = bias - through(rows, shift, small.base)
        if own is not None:
            small.now[own] = bias.to(small.base[own].dtype)
        elif holds(bias.abs().max() > _NOTHING * torch.finfo(rows.dtype).eps * scale):
            raise SurgeryError(f"{home.own_bias} was trained since it was fused, and {member.name} has no such bias")

    def _down(self, small: SmallParameters, place: int) -> Tensor:
        member, home = self.recipe.members[place], self.recipe.home.down
        whole = home.out_in(self.wide[home.weight])
        if quantised.is_quantised(whole):
            return quantised.joined([whole], [_back(self.recipe.columns(place))], 1, member.width)
        columns = self.recipe.own_columns(place, whole)
        scale = self.recipe.scale(member, small.base, columns)
        if scale is None:
            return columns
        columns = _divided(columns.t(), scale).t()
        rows = kept_rows(self.residue, member.down.weight)
        were = None if rows is None else zero_rows(self.recipe, member, small.recorded, columns)
        if rows is not None and were is not None:
            columns[scale == 0] = as_like(rows, columns)[(scale == 0)[were]]
        return columns


def _stored(matrix: Matrix, out_in: Tensor) -> Tensor:
    """A weight as its layer keeps it, with memory of its own."""
    return out_in if quantised.is_quantised(out_in) else matrix.out_in(out_in).contiguous()


def _back(places: Sequence[tuple[slice, slice]]) -> list[tuple[slice, slice]]:
    return [(own, wide) for wide, own in places]


def _divided(rows: Tensor, gain: Tensor) -> Tensor:
    """`[n, hidden]` over `[hidden]` in float32 or wider; zero where the divisor is."""
    dtype = wide_dtype(rows)
    divisor = torch.where(gain == 0, torch.ones_like(gain), gain).to(dtype)
    divided = rows.to(dtype) / divisor
    return divided.masked_fill(gain == 0, 0.0).to(rows.dtype)
