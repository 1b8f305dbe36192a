"""The grid of weight-only quantisation: integers of few bits, one scale for each run of columns of a row.

    w[row, column] = scale[row, column // group] * q[row, column]          q in -half .. half - 1, half = 2^(bits - 1)
    scale = (the value of largest magnitude of the run) / -half            in 8 significant bits

So that value is an end of the grid, q = -half, and every other is smaller: rounding what is on the grid finds the same
scales and integers again, whichever of float32, bfloat16 and float16 the values are kept in. With 4 bits scales are
float16 as well, and runs of 32 are the blocks of GGUF's Q4_0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfusion.errors import OptionError

BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class WeightGrid:
    """`group`: columns that share a scale."""

    bits: int
    group: int

    @classmethod
    def parse(cls, text: str, option: str = "grid") -> WeightGrid:
        """`"int4:32"` -> 4 bits, runs of 32 columns. Raises `OptionError` that names the option."""
        found = re.fullmatch(r"int(\d+):(\d+)", str(text).strip())
        if found is None or int(found[1]) not in BITS or not int(found[2]):
            raise OptionError(f"{option}: expected int4:GROUP or int8:GROUP, such as int4:32, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"int{self.bits}:{self.group}"

    def check(self, name: str, width: int, dtype: torch.dtype = torch.float32) -> None:
        """Raises `OptionError` where a weight of `width` columns, or of this dtype, has no place on the grid."""
        if width % self.group:
            raise OptionError(f"{self}: {name} has {width} inputs, which are no whole groups of {self.group}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise OptionError(f"{self}: {name} is {dtype}, and only floating-point weights are rounded")

    def quantised(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest integers, int8 `[rows, columns]`, and the scales, `[rows, columns / group]` in float32 or wider.
        Raises `ValueError` for what is no number."""
        runs = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, self.group))
        if not bool(runs.isfinite().all()):
            raise ValueError("not all values are finite")
        scales, _ = self._scales(runs)
        return self._integers(runs, scales[..., None]).flatten(-2).to(torch.int8), scales

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight rounded to the grid, in its own dtype: what an export makes of it."""
        integers, scales = self.quantised(weight)
        values: Tensor = integers.to(scales).unflatten(-1, (-1, self.group)) * scales[..., None]
        return values.flatten(-2).to(weight.dtype)

    def fed_back(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Values on the grid near `weight` `[rows, columns]`, of little `||(weight - values) factor||`, in float64.

        `factor`: the lower Cholesky factor L of the inputs' Gram matrix H, `[columns, columns]` (further rows and
        columns are left aside). Column k of the error, e, costs (e_k L_kk + sum over j > k of e_j L_jk)^2, so columns
        are rounded from the last to the first, each to what makes up for those behind it. That is GPTQ (arXiv
        2210.17323, which goes the other way, by the factor of the inverse), with scales from what is then left.
        """
        width, own = weight.shape[-1], weight.double()
        found, lower = torch.empty_like(own), factor.double()
        for start in range(width - self.group, -1, -self.group):
            here, behind = slice(start, start + self.group), slice(start + self.group, width)
            square = lower[here, here]
            pull = (own[:, behind] - found[:, behind]) @ lower[behind, here]
            target = own[:, here] + torch.linalg.solve_triangular(square, pull, upper=False, left=False)
            found[:, here] = self._one_run(target, square)
        return found

    def _one_run(self, target: Tensor, lower: Tensor) -> Tensor:
        """One run of columns, rounded one after the other; the largest value becomes the grid's end, as it gave the
        scale."""
        scales, largest = self._scales(target)
        found = torch.empty_like(target)
        for column in range(self.group - 1, -1, -1):
            error = target[:, column + 1 :] - found[:, column + 1 :]
            value = target[:, column] + error @ lower[column + 1 :, column] / lower[column, column]
            integers = self._integers(value, scales).masked_fill(largest == column, -(2 ** (self.bits - 1)))
            found[:, column] = integers * scales
        return found

    def _scales(self, runs: Tensor) -> tuple[Tensor, Tensor]:
        """Of each run, and which of its values is the largest."""
        largest = runs.abs().argmax(-1)
        wanted = runs.gather(-1, largest[..., None]).squeeze(-1) / -(2 ** (self.bits - 1))
        return (wanted.half() if self.bits == 4 else wanted).bfloat16().to(runs), largest

    def _integers(self, values: Tensor, scales: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return (values / torch.where(scales == 0, 1.0, scales)).round().clamp(-half, half - 1)
