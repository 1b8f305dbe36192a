"""Whether the quantised weights of a group can become one exactly; see `quantised.py`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.quantised import FUSE_FIRST, common_block, is_quantised, kind_of

_LEAST_BLOCK = 16  # smaller blocks would need more room for scales than they save


def check_group(recipe: GroupRecipe, tensors: Mapping[str, Tensor]) -> None:
    """Raises `SurgeryError` where quantised weights of a group cannot become one exactly."""
    for number, home in enumerate(recipe.home.matrices):
        names = [member.matrices[number].weight for member in recipe.members]
        quantised = [name for name in names if is_quantised(tensors[name])]
        if not quantised:
            continue
        kinds = {kind_of(tensors[name]) for name in names}
        if len(kinds) > 1:
            raise SurgeryError(f"{', '.join(names)} are quantised in different ways: {FUSE_FIRST}")
        is_down = number == len(recipe.home.projections)
        if home.transposed:
            raise SurgeryError(f"{home.weight} is quantised and stored transposed: {FUSE_FIRST}")
        if not is_down and (recipe.home.with_role("gain") or recipe.home.with_role("shift")):
            instead = FUSE_FIRST if recipe.heads else f"use norm='last', or {FUSE_FIRST}"  # attentions always fold
            raise SurgeryError(f"{home.weight} is quantised, so the norm's gain cannot be folded into it: {instead}")
        if is_down and any(recipe.scale(m, tensors, tensors[m.down.weight]) is not None for m in recipe.members):
            raise SurgeryError(f"{home.weight} is quantised, so no scale can be folded into it: {FUSE_FIRST}")
        block = common_block([tensors[name] for name in names], _edges(recipe) if is_down else ())
        if block < _LEAST_BLOCK:
            raise SurgeryError(
                f"{home.weight}: the members' scales fit together only in blocks of {block}: {FUSE_FIRST}"
            )


def _edges(recipe: GroupRecipe) -> list[int]:
    """Where runs of the members' channels begin and end."""
    pairs = (pair for place in range(len(recipe.members)) for pair in recipe.columns(place))
    return [edge for pair in pairs for part in pair for edge in (part.start, part.stop)]
