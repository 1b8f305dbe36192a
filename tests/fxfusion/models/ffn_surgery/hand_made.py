"""Groups of FFNs written down by hand, and what they compute in plain PyTorch: no model, no capture, no surgery.

A member computes `tail(down(silu(gate(y)) * up(y)))` with `y = gain * n + shift`, for a normalised stream `n`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Constant, Cut, Matrix, Member, TailStep

HIDDEN, WIDTHS = 6, (4, 6, 3)
Tensors = dict[str, Tensor]


class PlusOne(nn.Module):
    def forward(self, weight: Tensor) -> tuple[Tensor]:
        return (1.0 + weight,)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the members look. `biases`: on their projections and down; `plus_one`: the gain is `1 + weight`;
    `scale`: a vector after the down projection, `offset`: one that is added after it, `multiplier`: a number there;
    `slope`: one number in the activation."""

    norm: Any = "fold"
    packed: str = ""
    transposed: bool = False
    biases: bool = False
    shift: bool = False
    plus_one: bool = False
    scale: bool = False
    offset: bool = False
    multiplier: float = 1.0
    slope: bool = False
    shards: int = 1


def recipe(form: Form) -> GroupRecipe:
    members = tuple(_member(form, layer, width) for layer, width in enumerate(WIDTHS))
    home, last = members[0], members[-1]
    fills = [(constant.names[0], 0.0 if form.plus_one else 1.0) for constant in home.with_role("gain")]
    fills += [(constant.names[0], 0.0) for constant in home.with_role("shift")]
    fills += [(step.names[0], float(kind == "mul")) for kind, step in home.tail if isinstance(step, Constant)]
    copies = zip(home.prologue, last.prologue, strict=True) if form.norm == "last" else ()
    return GroupRecipe(
        members=members,
        norm=form.norm,
        fills=tuple(fills),
        copies=tuple((first.names[0], own.names[0]) for first, own in copies),
        in_bias=form.biases or (form.shift and form.norm == "fold"),
        down_bias=form.biases or form.offset,
        shards=form.shards,
    )


def _member(form: Form, layer: int, width: int) -> Member:
    def matrix(name: str) -> Matrix:
        return Matrix(f"{layer}.{name}.weight", form.transposed, f"{layer}.{name}.bias" if form.biases else None)

    names = ("gate_up",) if form.packed else ("gate", "up")
    cuts = (Cut(0, 0, width, 1), Cut(1, 0, width, 1))
    if form.packed == "chunk":
        cuts = (Cut(0, 0, width, 1), Cut(0, width, 2 * width, 1))
    elif form.packed == "interleaved":
        cuts = (Cut(0, 0, 2 * width, 2), Cut(0, 1, 2 * width, 2))
    gain = Constant((f"{layer}.norm.weight",), fx.symbolic_trace(PlusOne()) if form.plus_one else None)
    prologue = (gain, Constant((f"{layer}.norm.bias",))) if form.shift else (gain,)
    roles: Any = ("fixed",) * len(prologue) if form.norm == "last" else ("gain", "shift")[: len(prologue)]
    tail: list[TailStep] = [("mul", Constant((f"{layer}.scale",)))] if form.scale else []
    tail += [("add", Constant((f"{layer}.offset",)))] if form.offset else []
    tail += [("mul", form.multiplier)] if form.multiplier != 1.0 else []
    return Member(
        layer=layer,
        name=f"layers.{layer}",
        width=width,
        projections=tuple(matrix(name) for name in names),
        cuts=cuts,
        down=matrix("down"),
        prologue=prologue,
        roles=roles,
        middle=(Constant((f"{layer}.slope",)),) if form.slope else (),
        tail=tuple(tail),
    )


def parameters(group: GroupRecipe, seed: int = 0) -> Tensors:
    """Random ones of all members, float64, well away from zero."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found: Tensors = {}
    for member in group.members:
        rows = 2 * member.width // len(member.projections)
        sizes = [(rows, HIDDEN)] * len(member.projections) + [(HIDDEN, member.width)]
        for matrix, (outputs, inputs) in zip(member.matrices, sizes, strict=True):
            found[matrix.weight] = random(*((inputs, outputs) if matrix.transposed else (outputs, inputs)))
            if matrix.bias is not None:
                found[matrix.bias] = random(outputs)
        for constant in member.prologue:
            found[constant.names[0]] = 1.0 + 0.3 * random(HIDDEN)
        found |= {constant.names[0]: 1.0 + 0.3 * random(1) for constant in member.middle if constant is not None}
        for _, step in member.tail:
            if isinstance(step, Constant):
                found[step.names[0]] = 1.0 + 0.3 * random(HIDDEN)
    return found


def packed(group: GroupRecipe, tensors: Tensors) -> Tensors:
    return dict(group.pack(tensors))


def branch(member: Member, tensors: Mapping[str, Tensor], n: Tensor, norm_of: Member | None = None) -> Tensor:
    """What one FFN adds to the stream. `n` `[tokens, hidden]`; `norm_of`: whose gain and shift are used."""
    prologue = (norm_of or member).prologue
    y = n * prologue[0].value(tensors)
    if len(prologue) > 1:
        y = y + prologue[1].value(tensors)
    outputs = [_linear(matrix, tensors, y) for matrix in member.projections]
    pieces = [outputs[cut.projection][:, cut.channels] for cut in member.cuts]
    inner = F.silu(pieces[0]) * pieces[1]
    for constant in member.middle:
        inner = inner * (constant.value(tensors) if constant is not None else 1.0)
    out = _linear(member.down, tensors, inner)
    for kind, step in member.tail:
        value = step.value(tensors) if isinstance(step, Constant) else step
        out = out * value if kind == "mul" else out + value
    return out


def parallel(group: GroupRecipe, tensors: Mapping[str, Tensor], n: Tensor) -> Tensor:
    """The sum of all members' branches: the form that fusing keeps."""
    last = group.members[-1] if group.norm == "last" else None
    found: Tensor = sum(branch(member, tensors, n, last) for member in group.members)  # type: ignore[assignment]
    return found


def fused(group: GroupRecipe, wide: Mapping[str, Tensor], n: Tensor) -> Tensor:
    """What the first member's modules compute with wide parameters."""
    home = group.home

    def widened(matrix: Matrix, needed: bool) -> Matrix:
        return Matrix(matrix.weight, matrix.transposed, matrix.own_bias if needed else None)

    cuts = []
    for cut in home.cuts:
        whole = cut.widened(home.width, group.width)
        cuts.append(Cut(cut.projection, whole.start, whole.stop, cut.step))
    member = Member(
        layer=0,
        name="fused",
        width=group.width,
        projections=tuple(widened(matrix, group.in_bias) for matrix in home.projections),
        cuts=tuple(cuts),
        down=widened(home.down, group.down_bias),
        prologue=home.prologue,
        roles=home.roles,
        middle=home.middle,
        tail=home.tail,
    )
    return branch(member, wide, n)


def stream(seed: int = 7) -> Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(wide: Tensors, names: Sequence[str] | None = None, seed: int = 3) -> Tensors:
    """Every parameter (or those named), moved a little at random."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in wide.items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        found[name] = value + 0.1 * noise if names is None or name in names else value.clone()
    return found


def _linear(matrix: Matrix, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, matrix.out_in(tensors[matrix.weight]), None if matrix.bias is None else tensors[matrix.bias])
