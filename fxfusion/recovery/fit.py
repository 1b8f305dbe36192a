"""The refit of one layer: sums over calibration text, a penalty chosen on other text, and only what helps there.

Where the sums do not fit into memory the channels are solved in parts, one after the other, twice over: each part takes
what the parts before it left (block Gauss-Seidel, which goes towards the solution of all channels at once).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.errors import OptionError
from fxfusion.models.weight_grid import WeightGrid
from fxfusion.recovery.gram import GramSums, parts_of
from fxfusion.recovery.projections import Projection
from fxfusion.recovery.streams import Streams

PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)
DAMPING = 1e-2  # of what is rounded without a fit, as a part of the mean diagonal
_Parameters = tuple[Tensor, Tensor | None]  # weight and bias
_SWEEPS = 2  # over the parts, where there is more than one


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """`penalty`: as a part of the mean diagonal; of several parts, that of the last. `before`, `after`: distance of the
    stream from the reference's on the text for validation, as a part of the size of the latter. `applied`: False where
    nothing was better than the layer as it was; `why` says more. On a grid, "as it was" means rounded to the nearest,
    and a layer that is applied without a penalty was rounded with feedback, and not fitted."""

    penalty: float | None
    before: float
    after: float
    applied: bool
    parts: int
    why: str = ""


@dataclass(slots=True, kw_only=True)
class Fitter:
    """`calibration`: what is fitted to; `validation`: what decides. `limit`: bytes. `grid`: what weights must be on,
    and are on already, rounded to the nearest; `exact`: what they were before that."""

    model: nn.Module
    calibration: Streams
    validation: Streams
    limit: int
    penalties: Sequence[float] = PENALTIES
    grid: WeightGrid | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def fit(self, projection: Projection) -> Fitted:
        """Refit one layer in place; its parameters stay as they are where that is no better."""
        weight = self.model.get_parameter(projection.weight)
        bias = None if projection.bias is None else self.model.get_parameter(projection.bias)
        exact = self.exact[projection.weight] if self.grid is not None else weight.detach().clone()
        old = exact, None if bias is None else bias.detach().clone()
        width, unit = projection.width + (bias is not None), 1 if self.grid is None else self.grid.group
        tried = len(self.penalties) + (0 if self.grid is None else 2)  # what is rounded takes some, too
        parts = parts_of(width, projection.hidden, tried, self.limit, projection.name, unit)
        steps = parts * (1 if len(parts) == 1 else _SWEEPS)
        first = last = penalty = None
        why, applied = "", False
        for part in steps:
            found = self._part(projection, weight, bias, part, old)
            first = found.before if first is None else first
            last, why = found.after, found.why
            penalty = found.penalty if found.penalty is not None else penalty
            applied |= found.applied
        assert first is not None and last is not None
        if not applied:
            return Fitted(penalty=None, before=first, after=first, applied=False, parts=len(parts), why=why)
        return Fitted(penalty=penalty, before=first, after=last, applied=True, parts=len(parts))

    def _part(
        self,
        projection: Projection,
        weight: Tensor,
        bias: Tensor | None,
        part: slice,
        old: _Parameters,
    ) -> Fitted:
        """Change the channels of one part, or leave them."""
        now = _Channels(projection, weight, bias, part)
        sums = GramSums(part.stop - part.start, projection.hidden, weight.device, bias=now.has_bias)
        for rows in self.calibration.rows(projection):
            sums.add(now.inputs(rows.inputs), rows.lacking)
        if sums.scale <= 0.0:
            before, _ = self._errors(projection, now, [])
            return Fitted(penalty=None, before=before, after=before, applied=False, parts=1, why="its inputs are zero")
        moved = now.values() - _Channels(projection, *old, part).values()
        changes: list[tuple[float | None, Tensor]] = []
        for share in (*self.penalties, *(() if self.grid is None else (None,))):
            factor = sums.factor(DAMPING if share is None else share)
            change = -moved if share is None else sums.solve(share, moved if bool(moved.any()) else None, factor)
            if factor is not None and change is not None:
                changes.append((share, now.rounded(change, self.grid, factor)))
        del sums, factor
        before, after = self._errors(projection, now, [change for _, change in changes])
        best = min(range(len(after)), key=after.__getitem__, default=None)
        if best is None or not after[best] < before:
            why = "its sums are singular" if best is None else "no penalty was better on the text for validation"
            return Fitted(penalty=None, before=before, after=before, applied=False, parts=1, why=why)
        now.add(changes[best][1], self.grid)
        return Fitted(penalty=changes[best][0], before=before, after=after[best], applied=True, parts=1)

    def _errors(self, projection: Projection, now: _Channels, changes: Sequence[Tensor]) -> tuple[float, list[float]]:
        """Distance from the reference's stream on the text for validation, as it is and with each change."""
        sums = torch.zeros(len(changes) + 1, dtype=torch.float64)
        size = 0.0
        for rows in self.validation.rows(projection):
            inputs, scale = now.inputs(rows.inputs), rows.scale
            sums[0] += _square(rows.lacking, scale)
            for index, change in enumerate(changes):
                sums[index + 1] += _square(rows.lacking - inputs @ change.t(), scale)
            size += rows.size
        errors = (sums / max(size, 1e-300)).sqrt().tolist()
        return errors[0], errors[1:]


class _Channels:
    """Some input channels of a layer, the bias taken for one more at the end."""

    def __init__(self, projection: Projection, weight: Tensor, bias: Tensor | None, part: slice) -> None:
        self.has_bias = bias is not None and part.stop > projection.width
        self.columns = slice(part.start, min(part.stop, projection.width))
        self.weight = projection.out_in(weight.detach())[:, self.columns]
        self.bias = bias.detach() if bias is not None and self.has_bias else None

    def inputs(self, whole: Tensor) -> Tensor:
        own = whole[:, self.columns]
        return torch.cat([own, own.new_ones(own.shape[0], 1)], dim=1) if self.has_bias else own

    def values(self) -> Tensor:
        """`[hidden, channels]` in float64."""
        own = self.weight.double()
        return own if self.bias is None else torch.cat([own, self.bias.double()[:, None]], dim=1)

    def rounded(self, change: Tensor, grid: WeightGrid | None, factor: Tensor) -> Tensor:
        """The change that the weights' dtype, or the grid, can hold, in the dtype of the rows. `factor`: Cholesky's, of
        what was solved."""
        now = self.values()
        new, kind = now + change, torch.promote_types(self.weight.dtype, torch.float32)
        if grid is not None:
            width = self.weight.shape[1]
            new[:, :width] = grid.fed_back(new[:, :width], factor)
        return (new.to(self.weight.dtype).double() - now).to(kind)

    def add(self, change: Tensor, grid: WeightGrid | None) -> None:
        wide = self.values() + change.double()
        own = wide[:, : self.weight.shape[1]]
        self.weight.copy_(own if grid is None else grid.nearest(own))  # where it is, but for the rounding of a sum
        if self.bias is not None:
            self.bias.copy_(wide[:, -1])


def _square(lacking: Tensor, scale: Tensor | float) -> Tensor:
    """Sum of squares in the units of the stream."""
    by_channel = lacking.square().sum(0, dtype=torch.float64)
    factor = scale.to(by_channel).square() if isinstance(scale, Tensor) else scale**2
    return (by_channel * factor).sum().cpu()


Listener = Callable[[Any, Fitted], None]  # the layer (a `Projection` or a `Reader`), and what came of it


def check_penalties(given: Sequence[float]) -> tuple[float, ...]:
    """Raises `OptionError` unless they are positive numbers."""
    if not given or not all(0 < one < float("inf") for one in given):
        raise OptionError(f"penalties: expected positive numbers, got {given!r}")
    return tuple(sorted(set(map(float, given))))
