"""The members' small parameters, from what they were and what training made of those of the fused FFN.

Before:  members' gains g_i, shifts s_i; the fused FFN's gain 1 and shift 0
After:   the fused FFN's gain a and shift t  ->  members' gains g_i * a, shifts s_i + g_i * t

Exact: member i computes W_i (g_i (a n + t) + s_i) = W_i g_i (a n + t) + W_i s_i, which is what the fused FFN does with
its rows W_i g_i and its part W_i s_i of the bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Constant, Member, wide_dtype


@dataclass(slots=True)
class SmallParameters:
    """`wide`: parameters of the fused FFN by the first member's names; `residue`: see `residue.py`.

    `recorded`: what they were. `base`: by which the wide weights are taken apart: the same, but one where a zero stood
    and training has since given the weights behind it values. `now`: what the members get; biases of projections stay
    to be filled in.
    """

    recipe: GroupRecipe
    wide: Mapping[str, Tensor]
    residue: Mapping[str, Tensor]
    recorded: dict[str, Tensor] = field(init=False)
    base: dict[str, Tensor] = field(init=False)
    now: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.recorded = {}
        for member in self.recipe.members:
            for name, like in _counterparts(member, self.recipe.home):
                example = self.wide.get(like, self.wide[self.recipe.home.down.weight])
                self.recorded[name] = as_like(self.residue[name], example)
        self.base = dict(self.recorded)
        for place, member in enumerate(self.recipe.members):
            self._revive_gains(place, member)
            self._revive_scales(place, member)
        self.now = dict(self.base)
        self._take_over()

    def gains(self, member: Member) -> list[Tensor]:
        """What the columns of a member's projections are divided by, each one number or `[hidden]`."""
        return [constant.value(self.base).reshape(-1) for constant in member.with_role("gain")]

    def _revive_gains(self, place: int, member: Member) -> None:
        """Training can fill the columns of a channel that the member's gain took out. Its gain is one, then."""
        gains = self.gains(member)
        if not any(holds((gain == 0).any()) for gain in gains):
            return
        filled = torch.zeros((), dtype=torch.bool)
        for number, matrix in enumerate(self.recipe.home.projections):
            whole = matrix.out_in(self.wide[matrix.weight])
            for target, _ in self.recipe.slices(number, place):
                filled = filled.to(whole.device) | (whole[target] != 0).any(0)
        dead = zeros_of(gains).expand_as(filled)
        self._set_to_one(member.with_role("gain"), filled & dead)

    def _revive_scales(self, place: int, member: Member) -> None:
        """The same for rows of the down projection, and the scale after it."""
        home = self.recipe.home
        whole = home.down.out_in(self.wide[home.down.weight])
        scale = self.recipe.scale(member, self.base, whole)
        if scale is None or not holds((scale == 0).any()):
            return
        filled = (self.recipe.own_columns(place, whole) != 0).any(1) & (scale == 0)
        self._set_to_one(_scales(member), filled)

    def _set_to_one(self, constants: Iterable[Constant], where: Tensor) -> None:
        if not holds(where.any()):
            return
        for constant in constants:
            name, value = constant.names[0], self.base[constant.names[0]]
            mask = where.reshape(value.shape) if value.numel() == where.numel() else where.any()
            self.base[name] = torch.where(mask, torch.full_like(value, self._fill(constant)), value)

    def _fill(self, constant: Constant) -> float:
        """The value of the parameter that makes the constant one."""
        fill = constant.fill_for(1.0, self.base[constant.names[0]])
        if fill is None:
            raise SurgeryError(f"{', '.join(constant.names)}: what training made of it since cannot be told")
        return fill

    def _take_over(self) -> None:
        recipe = self.recipe
        for name, source in recipe.copies:
            self.now[source] = self.wide[name].clone()
        for index, constant in enumerate(recipe.home.middle):
            if constant is not None:
                self._middle(index, self.wide[constant.names[0]])
        for index, (name, _) in enumerate(recipe.home.per_head):
            self._per_head(index, self.wide[name])
        for index, constant in enumerate(recipe.home.with_role("gain")):
            self._multiply([member.with_role("gain")[index] for member in recipe.members], constant)
        for index, constant in enumerate(recipe.home.with_role("shift")):
            self._shift(index, constant)
        self._tail()
        if recipe.down_bias:
            self._down_bias()

    def _middle(self, index: int, values: Tensor) -> None:
        for place, member in enumerate(self.recipe.members):
            constant = member.middle[index]
            assert constant is not None
            name, own = constant.names[0], self.recipe.own_columns(place, values.reshape(-1))
            if self.base[name].numel() == 1:
                if not holds((own == own[0]).all(), unknown=True):
                    raise SurgeryError(f"{name} was one number, and training since has made it one per channel")
                own = own[:1]
            self.now[name] = own.reshape(self.base[name].shape).clone()

    def _per_head(self, index: int, rows: Tensor) -> None:
        first = 0
        for member in self.recipe.members:
            name, heads = member.per_head[index]
            own = rows[first : first + heads]
            if not holds((own == own[:1]).all(), unknown=True):
                raise SurgeryError(f"{name} was shared by all heads, and training since has made it one per head")
            self.now[name] = own[0].clone()
            first += heads

    def _multiply(self, constants: Iterable[Constant], home: Constant) -> None:
        """A factor that was one: every member's times what it is. A constant is its parameter plus `rest`."""
        fill = dict(self.recipe.fills)[home.names[0]]
        if is_filled(self.wide[home.names[0]], fill):
            return
        factor = self.wide[home.names[0]].to(wide_dtype(self.wide[home.names[0]])) + (1.0 - fill)
        for constant in constants:
            name, rest = constant.names[0], 1.0 - self._fill(constant)
            product = (self.base[name].to(factor.dtype) + rest) * factor - rest
            self.now[name] = product.to(self.base[name].dtype)

    def _shift(self, index: int, home: Constant) -> None:
        """A shift that was zero: every member's own, and through its gain what it is."""
        fill = dict(self.recipe.fills)[home.names[0]]
        shift = self.wide[home.names[0]]
        if is_filled(shift, fill):
            return
        for member in self.recipe.members:
            name, dtype = member.with_role("shift")[index].names[0], wide_dtype(shift)
            through = shift.to(dtype) - fill
            for gain in self.gains(member):
                through = through * gain.to(dtype)
            self.now[name] = (self.base[name].to(dtype) + through).to(self.base[name].dtype)

    def _tail(self) -> None:
        """Scales after the down projection are shared like gains, where nothing is added between or after them."""
        recipe, home, fills = self.recipe, self.recipe.home, dict(self.recipe.fills)
        trained = [
            step.names[0]
            for _, step in home.tail
            if isinstance(step, Constant) and not is_filled(self.wide[step.names[0]], fills[step.names[0]])
        ]
        if not trained:
            return
        adds = any(kind == "add" for member in recipe.members for kind, _ in member.tail)
        if adds or len({len(_scales(member)) for member in recipe.members}) > 1:
            raise SurgeryError(f"{trained[0]} was trained since it was fused, and cannot be shared out among members")
        for index, constant in enumerate(_scales(home)):
            self._multiply([_scales(member)[index] for member in recipe.members], constant)

    def _down_bias(self) -> None:
        """What the sum of biases gained goes to one member that has one, through the scale after it."""
        recipe, home = self.recipe, self.recipe.home
        down = home.down.out_in(self.wide[home.down.weight])
        dtype = wide_dtype(down)
        untrained = recipe.down_bias_of(self.base, down).to(dtype)
        change = (self.wide[home.down.own_bias].to(dtype) - untrained) * home.kept_scale
        if not holds(change.any()):
            return
        for member in recipe.members:
            scale = torch.as_tensor(member.affine(self.base, dtype)[0], dtype=dtype, device=down.device)
            if member.down.bias is not None and holds(((scale != 0) | (change == 0)).all()):
                name = member.down.bias
                gained = change / torch.where(scale == 0, torch.ones_like(scale), scale)
                self.now[name] = (self.base[name].to(dtype) + gained).to(self.base[name].dtype)
                return
        raise SurgeryError(f"{home.down.own_bias} was trained since it was fused, and no member has such a bias")


def holds(condition: Tensor, unknown: bool = False) -> bool:
    """Whether it is true; `unknown` where there are no values (on the meta device nothing was trained)."""
    return unknown if condition.is_meta else bool(condition)


def is_filled(value: Tensor, fill: float) -> bool:
    return holds((value == fill).all(), unknown=True)


def zeros_of(factors: Iterable[Tensor]) -> Tensor:
    """Where one of the factors is zero."""
    return torch.stack(torch.broadcast_tensors(*(factor == 0 for factor in factors))).any(0)


def as_like(value: Tensor, example: Tensor) -> Tensor:
    """On the device of another tensor, and of its dtype if numbers."""
    return value.to(device=example.device, dtype=example.dtype if value.is_floating_point() else value.dtype)


def _scales(member: Member) -> list[Constant]:
    """The parameters by which a member's result is multiplied."""
    return [step for kind, step in member.tail if kind == "mul" and isinstance(step, Constant)]


def _counterparts(member: Member, home: Member) -> Iterable[tuple[str, str]]:
    """Each small parameter of a member, and that of the first member which is in its place."""
    for own, first in zip(member.matrices, home.matrices, strict=True):
        if own.bias is not None:
            yield own.bias, first.own_bias
    constants = [*zip(member.prologue, home.prologue, strict=True), *zip(member.middle, home.middle, strict=True)]
    pairs = [(one, first) for one, first in constants if one is not None and first is not None]
    own_tail, first_tail = ([step for _, step in one.tail if isinstance(step, Constant)] for one in (member, home))
    pairs += zip(own_tail, first_tail if len(own_tail) == len(first_tail) else own_tail, strict=True)
    for constant, of_home in pairs:
        yield from zip(constant.names, of_home.names, strict=True)
    yield from zip((name for name, _ in member.per_head), (name for name, _ in home.per_head), strict=True)
