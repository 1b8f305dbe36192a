"""The little that a fused model must remember so that its members can be given back.

    residue   gains, shifts, biases and scales of all members; weight columns whose gain is zero, rows whose scale is

Kept on the model by `fuse`; a checkpoint that keeps the fused form writes it to a small file
(`fxfusion/checkpoints/nemotron_nas/members.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Member, Tensors

Residue = dict[str, Tensor]
_COLUMNS, _ROWS = ":columns", ":rows"


@torch.no_grad()
def residue_of(recipe: GroupRecipe, tensors: Tensors) -> Residue:
    """What one group loses. `tensors`: the members' parameters. Names are theirs, those of columns and rows longer."""
    kept: Residue = {}
    for member in recipe.members:
        kept |= {name: tensors[name].detach().clone() for name in member.small}
        hidden = member.projections[0].out_in(tensors[member.projections[0].weight]).shape[1]
        columns = zero_columns(member, tensors, hidden)
        if columns is not None:
            for matrix in member.projections:
                kept[matrix.weight + _COLUMNS] = matrix.out_in(tensors[matrix.weight])[:, columns].detach().clone()
        rows = zero_rows(recipe, member, tensors, member.down.out_in(tensors[member.down.weight]))
        if rows is not None:
            kept[member.down.weight + _ROWS] = member.down.out_in(tensors[member.down.weight])[rows].detach().clone()
    return kept


def extra_shapes(recipe: GroupRecipe, small: Tensors, hidden: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the columns and rows that `residue_of` keeps. `small`: the members' small parameters."""
    found: dict[str, tuple[int, int]] = {}
    for member in recipe.members:
        columns = zero_columns(member, small, hidden)
        if columns is not None:
            for number, matrix in enumerate(member.projections):
                found[matrix.weight + _COLUMNS] = (member.rows(number), int(columns.sum()))
        rows = zero_rows(recipe, member, small, torch.empty(hidden, 1))
        if rows is not None:
            found[member.down.weight + _ROWS] = (int(rows.sum()), member.width)
    return found


def zero_columns(member: Member, small: Tensors, hidden: int) -> Tensor | None:
    """Which channels of the stream a gain of the norm takes out, `bool [hidden]`; None where none is. `small`: the
    member's small parameters."""
    gains = [constant.value(small).reshape(-1) for constant in member.with_role("gain")]
    if not gains or gains[0].is_meta:
        return None
    flags = torch.stack(torch.broadcast_tensors(*(gain == 0 for gain in gains))).any(0)
    return flags.expand(hidden) if bool(flags.any()) else None


def zero_rows(recipe: GroupRecipe, member: Member, small: Tensors, down: Tensor) -> Tensor | None:
    """Which channels a scale after the down projection `[hidden, width]` takes out, `bool [hidden]`; None where none
    is."""
    scale = recipe.scale(member, small, down)
    if scale is None or scale.is_meta or not bool((scale == 0).any()):
        return None
    return scale == 0


def kept_columns(residue: Tensors, weight: str) -> Tensor | None:
    return residue.get(weight + _COLUMNS)


def kept_rows(residue: Tensors, weight: str) -> Tensor | None:
    return residue.get(weight + _ROWS)
