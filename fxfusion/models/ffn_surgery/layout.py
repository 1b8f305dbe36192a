"""What the members of a group are made of, by parameter name. No tensors: those come from a model or a checkpoint.

member of layer 5:  projections  model.layers.5.mlp.gate_proj.weight, ...up_proj.weight      [width, hidden]
                    down         model.layers.5.mlp.down_proj.weight                         [hidden, width]
                    gains        model.layers.5.post_attention_layernorm.weight              [hidden]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor that a model computes from parameters: `1 + weight`, or the parameter itself.

    `names`: of the parameters; `module`: computes the value from them, None where it is the one parameter.
    """

    names: tuple[str, ...]
    module: fx.GraphModule | None = None

    def value(self, tensors: Tensors) -> Tensor:
        sources = [tensors[name] for name in self.names]
        if self.module is None:
            return sources[0]
        found: tuple[Tensor] = self.module(*sources)
        return found[0]

    def fill_for(self, wanted: float, example: Tensor) -> float | None:
        """The value of the one parameter (it looks like `example`) that makes the constant `wanted` everywhere."""
        if len(self.names) != 1:
            return None
        for fill in (wanted, 1.0 - wanted):
            filled = torch.full(example.shape, fill, dtype=example.dtype)
            if bool((self.value({self.names[0]: filled}) == wanted).all()):
                return fill
        return None


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer's parameters. `transposed`: the weight is stored `[in, out]`. `bias`: None where there is none."""

    weight: str
    transposed: bool
    bias: str | None

    @property
    def own_bias(self) -> str:
        """Name of the bias, or the one that it would have."""
        return self.bias or f"{self.weight.rpartition('.')[0]}.bias"

    def out_in(self, stored: Tensor) -> Tensor:
        """The weight as `[out, in]`, a view."""
        return stored.t() if self.transposed else stored


@dataclass(frozen=True, slots=True)
class Cut:
    """Output channels `start:stop:step` of projection number `projection` that the activation reads as one piece."""

    projection: int
    start: int
    stop: int
    step: int

    @property
    def channels(self) -> slice:
        return slice(self.start, self.stop, self.step)

    @property
    def length(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def widened(self, width: int, total: int) -> slice:
        """Where the same piece stands once its member's width has grown from `width` to `total`, and every piece
        with it."""
        length = self.length * total // width
        if self.step > 1:
            return slice(self.start, self.start + length * self.step, self.step)
        start = self.start * total // width
        return slice(start, start + length)


TailStep = tuple[Literal["mul", "add"], "Constant | float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One FFN, or one attention. `layer`: position of its decoder layer in the model as it is. `prologue`: constants
    of its norm; `roles`: what becomes of each. `middle`: constants of the activation, None for one number that all
    members share. `per_head`: of an attention, parameters that all its heads share, and how many heads these are.

    An attention's `width` is that of its last projection; its pieces are of other lengths where heads share keys.
    """

    layer: int
    name: str
    width: int
    projections: tuple[Matrix, ...]
    cuts: tuple[Cut, ...]
    down: Matrix
    prologue: tuple[Constant, ...]
    roles: tuple[Literal["gain", "shift", "fixed"], ...]
    middle: tuple[Constant | None, ...]
    tail: tuple[TailStep, ...]
    per_head: tuple[tuple[str, int], ...] = ()

    def rows(self, number: int) -> int:
        """Output channels of a projection."""
        return sum(cut.length for cut in self.cuts if cut.projection == number)

    def with_role(self, role: str) -> list[Constant]:
        return [constant for constant, own in zip(self.prologue, self.roles, strict=True) if own == role]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (*self.projections, self.down)

    @property
    def large(self) -> tuple[str, ...]:
        """Names of the weight matrices."""
        return tuple(matrix.weight for matrix in self.matrices)

    @property
    def small(self) -> tuple[str, ...]:
        """Names of the other parameters: biases and constants."""
        biases = [matrix.bias for matrix in self.matrices if matrix.bias is not None]
        constants = [*self.prologue, *(constant for constant in self.middle if constant is not None)]
        constants += [value for _, value in self.tail if isinstance(value, Constant)]
        names = [*biases, *(name for constant in constants for name in constant.names)]
        return tuple(dict.fromkeys([*names, *(name for name, _ in self.per_head)]))

    def affine(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """The tail as `scale * x + shift`; each one number or `[hidden]`, in `dtype`."""
        scale: Tensor | float = 1.0
        shift: Tensor | float = 0.0
        for kind, step in self.tail:
            value = step.value(tensors).reshape(-1).to(dtype) if isinstance(step, Constant) else step
            if kind == "mul":
                scale, shift = scale * value, shift * value
            else:
                shift = shift + value
        return scale, shift

    @property
    def kept_scale(self) -> float:
        """What of the tail stays where its constants are set to one and zero: the numbers in the model's code."""
        total = 1.0
        for kind, step in self.tail:
            if kind == "mul" and not isinstance(step, Constant):
                total *= step
        return total


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Products and sums of weights are taken in float32 or wider, and rounded once."""
    return torch.promote_types(tensor.dtype, torch.float32)
