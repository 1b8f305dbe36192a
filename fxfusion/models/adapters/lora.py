"""Low-rank updates of the members' weights as one low-rank update of the wide weight.

gate, up:  B_i [width_i, r_i], A_i [r_i, hidden]    ->   B block-diagonal, A = all rows of A_i * g_i
down:      B_i [hidden, r_i],  A_i [r_i, width_i]   ->   B = all columns of scale_i * B_i, A block-diagonal

Exact: each member's part of the wide update is its own, with the gain of its norm folded in like into its weight. The
rank is the sum of ranks; a scaling that differs from the first member's goes into B.
Source: Hu et al., arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Tensors, wide_dtype

_TOKENS = 4
_ROUNDING = 128  # times the dtype's epsilon


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """`x -> (x @ a.T @ b.T + bias) * scaling`. `a`: `[rank, in]`, `b`: `[out, rank]`, `bias`: `[out]` or None."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        update = x @ self.a.to(x.dtype).t() @ self.b.to(x.dtype).t()
        return (update if self.bias is None else update + self.bias.to(x.dtype)) * self.scaling


Updates = Sequence["LowRank | None"]  # one for each member, None where it has no adapter


@torch.no_grad()
def widened(recipe: GroupRecipe, number: int, updates: Updates, tensors: Tensors, check: bool) -> LowRank:
    """The members' updates of matrix `number` (the down projection is the last) as one; at least one has one.

    `check`: prove it on random inputs. Raises `SurgeryError` where no such update holds them.
    """
    if number == len(recipe.home.projections):
        wide = _wide_down(recipe, updates, tensors)
        if check:
            _check_down(recipe, updates, wide, tensors)
        return wide
    wide = _wide_projection(recipe, number, updates, tensors)
    if check:
        _check_projection(recipe, number, updates, wide, tensors)
    return wide


def _wide_projection(recipe: GroupRecipe, number: int, updates: Updates, tensors: Tensors) -> LowRank:
    blank = _Blank.of(updates, recipe.home.projections[number].weight)
    own = _only(updates)
    rows = recipe.home.rows(number) * recipe.width // recipe.home.width
    wide_b = blank.b.new_zeros(rows, blank.rank)
    bias = blank.b.new_zeros(rows) if any(update.bias is not None for _, update in own) else None
    parts = []
    for (place, update), ranks in zip(own, blank.ranks, strict=True):
        member, share = recipe.members[place], blank.share(update)
        a = update.a.to(wide_dtype(update.a))
        shifts = [constant.value(tensors).reshape(-1) for constant in member.with_role("shift")]
        if shifts and bias is None:
            raise SurgeryError(
                f"{member.projections[number].weight}: its norm has a bias, which the adapter cannot take up: "
                "fuse with norm='last' or with adapters='merge', or train adapters with lora_bias=True"
            )
        moved = sum((a @ shift.to(a.dtype) for shift in shifts), start=a.new_zeros(a.shape[0]))
        for constant in member.with_role("gain"):
            a = a * constant.value(tensors).reshape(-1).to(a.dtype)
        parts.append(a.to(blank.a.dtype))
        offset = update.b.to(moved.dtype) @ moved
        offset = offset if update.bias is None else offset + update.bias
        for target, source in recipe.slices(number, place):
            wide_b[target, ranks] = (update.b[source] * share).to(wide_b.dtype)
            if bias is not None:
                bias[target] = (offset[source] * share).to(bias.dtype)
    return LowRank(a=torch.cat(parts), b=wide_b, bias=bias, scaling=blank.scaling)


def _wide_down(recipe: GroupRecipe, updates: Updates, tensors: Tensors) -> LowRank:
    blank = _Blank.of(updates, recipe.home.down.weight)
    own = _only(updates)
    wide_a = blank.a.new_zeros(blank.rank, recipe.width)
    hidden = blank.b.shape[0]
    bias = blank.b.new_zeros(hidden) if any(update.bias is not None for _, update in own) else None
    parts = []
    for (place, update), ranks in zip(own, blank.ranks, strict=True):
        member = recipe.members[place]
        scale = recipe.scale(member, tensors, member.down.out_in(tensors[member.down.weight]))
        factor = update.b.new_full((hidden,), blank.share(update), dtype=wide_dtype(update.b))
        factor = factor if scale is None else factor * scale
        for target, source in recipe.columns(place):
            wide_a[ranks, target] = update.a[:, source].to(wide_a.dtype)
        parts.append((update.b * factor[:, None]).to(blank.b.dtype))
        if bias is not None and update.bias is not None:
            bias += (update.bias * factor).to(bias.dtype)
    return LowRank(a=wide_a, b=torch.cat(parts, dim=1), bias=bias, scaling=blank.scaling)


def _check_projection(recipe: GroupRecipe, number: int, updates: Updates, wide: LowRank, tensors: Tensors) -> None:
    """The wide update of a random input must be every member's own."""
    x = _random(wide.a.shape[1], wide)
    found = wide(x)
    for place, update in enumerate(updates):
        member, own = recipe.members[place], x
        for constant in member.with_role("gain"):
            own = own * constant.value(tensors).reshape(-1).to(x.dtype)
        for constant in member.with_role("shift"):
            own = own + constant.value(tensors).reshape(-1).to(x.dtype)
        for target, source in recipe.slices(number, place):
            wanted = torch.zeros_like(found[:, target]) if update is None else update(own)[:, source]
            _compare(found[:, target], wanted, member.projections[number].weight, wide)


def _check_down(recipe: GroupRecipe, updates: Updates, wide: LowRank, tensors: Tensors) -> None:
    """The wide update of random activations must be the sum of the members'."""
    x = _random(wide.a.shape[1], wide)
    wanted = x.new_zeros(_TOKENS, wide.b.shape[0])
    for place, update in _only(updates):
        member = recipe.members[place]
        scale = recipe.scale(member, tensors, member.down.out_in(tensors[member.down.weight]))
        inputs = x.new_zeros(_TOKENS, member.width)
        for target, source in recipe.columns(place):
            inputs[:, source] = x[:, target]
        wanted += update(inputs) if scale is None else update(inputs) * scale.to(x.dtype)
    _compare(wide(x), wanted, recipe.home.down.weight, wide)


@dataclass(slots=True)
class _Blank:
    """What the parts of a wide update share. `a`, `b`: examples; `ranks`: where each member's lie."""

    a: Tensor
    b: Tensor
    scaling: float
    ranks: list[slice]

    @classmethod
    def of(cls, updates: Updates, name: str) -> _Blank:
        own = [update for _, update in _only(updates)]
        if len({(update.a.dtype, update.b.dtype, update.a.device) for update in own}) > 1:
            raise SurgeryError(f"{name}: the adapters of the members differ in dtype or device")
        ends = [sum(update.rank for update in own[: end + 1]) for end in range(len(own))]
        ranks = [slice(end - update.rank, end) for end, update in zip(ends, own, strict=True)]
        scaling = next((update.scaling for update in own if update.scaling), 1.0)
        return cls(own[0].a, own[0].b, scaling, ranks)

    @property
    def rank(self) -> int:
        return int(self.ranks[-1].stop)

    def share(self, update: LowRank) -> float:
        return update.scaling / self.scaling


def _only(updates: Updates) -> list[tuple[int, LowRank]]:
    return [(place, update) for place, update in enumerate(updates) if update is not None]


def _random(size: int, wide: LowRank) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_TOKENS, size, generator=generator, dtype=torch.float64).to(wide.a.device)


def _compare(found: Tensor, wanted: Tensor, name: str, wide: LowRank) -> None:
    allowed = _ROUNDING * torch.finfo(wide.a.dtype).eps * (1.0 + float(wanted.abs().max()))
    if not float((found - wanted).abs().max()) <= allowed:
        raise SurgeryError(f"{name}: the adapter that was carried over does not compute what the members' do")
