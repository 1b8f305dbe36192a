"""The other side of a refit: what reads the stream first is fitted to what it would have read in the reference.

    s [tokens, hidden]       the normed stream that gate and up (or q, k and v) of the fused model read now
    n_i [tokens, hidden]     what those of member i read in the reference
    W s + b  should be  W_i n_i + b_i          W: member i's rows of the wide layer; W_i, b_i: the reference's layer

    W = argmin || n_i W_i^T - s W^T ||^2 + penalty || W - W0 ||^2  =  W_i M^T,   M = argmin || n_i - s M^T ||^2 + ...

so sums over tokens are of `[hidden, hidden]`, however wide the layers are. Much of what a member's stream lacks is
linear in what is there; shapes and speed stay. The penalty, and whether anything is changed, is decided by the stream
after the block on text for validation. An approximation, measured like the other side (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxfusion.errors import OptionError
from fxfusion.recovery.fit import Fitted
from fxfusion.recovery.gram import GramSums
from fxfusion.recovery.readers import Part, Reader
from fxfusion.recovery.streams import Streams


@dataclass(slots=True, kw_only=True)
class InputFitter:
    """`model`: what is refitted; `source`: the model as it was loaded. `calibration`: what is fitted to; `validation`:
    what decides."""

    model: nn.Module
    source: nn.Module
    calibration: Streams
    validation: Streams
    penalties: Sequence[float]

    @torch.no_grad()
    def fit(self, reader: Reader) -> Fitted:
        """Refit one block's first layers in place; they stay as they are where that is no better."""
        if reader.refused:
            error = self._error(reader)
            return Fitted(penalty=None, before=error, after=error, applied=False, parts=1, why=reader.refused)
        own = {name: self.model.get_parameter(name) for name in reader.parameters}
        old = {name: value.detach().clone() for name, value in own.items()}
        device = own[reader.parts[0].weight].device
        sums = GramSums(reader.hidden + 1, reader.hidden * len(reader.sources), device, bias=True)
        for now, wanted in self.calibration.entries(reader):
            sums.add(torch.cat([now, now.new_ones(now.shape[0], 1)], dim=1), torch.cat(wanted, dim=1))
        before = best = self._error(reader)
        penalty, kept, why = None, old, "no penalty was better on the text for validation"
        for share in self.penalties if sums.scale > 0 else ():
            maps = {bias: _Map.of(sums, share, bias) for bias in {part.bias is not None for part in reader.parts}}
            if None in maps.values():
                why = "its sums are singular"
                continue
            for part in reader.parts:
                self._put(part, maps[part.bias is not None], own, old)
            error = self._error(reader)
            if error < best:
                penalty, best, kept = share, error, {name: value.detach().clone() for name, value in own.items()}
        for name, value in own.items():
            value.copy_(kept[name])
        applied = penalty is not None
        return Fitted(penalty=penalty, before=before, after=best, applied=applied, parts=1, why="" if applied else why)

    def _put(self, part: Part, found: _Map | None, own: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Give the rows of a part their new values."""
        assert found is not None
        before = _out_in(old[part.weight], part.transposed)[part.rows]
        source = _out_in(self.source.get_parameter(part.source), part.source_transposed)[part.source_rows]
        shift = None if part.source_bias is None else self.source.get_parameter(part.source_bias)[part.source_rows]
        if part.bias is not None:
            before = torch.cat([before, old[part.bias][part.rows][:, None]], dim=1)
        new = found.applied(part.member, source, shift, before)
        hidden = source.shape[1]
        _out_in(own[part.weight], part.transposed)[part.rows] = new[:, :hidden].to(before.dtype)
        if part.bias is not None:
            own[part.bias][part.rows] = new[:, hidden].to(before.dtype)

    def _error(self, reader: Reader) -> float:
        """Distance of the stream after the block from the reference's, as a part of the size of the latter; of what the
        block adds to the stream, where the reference has no such stream."""
        lacking, size = self.validation.distance(reader)
        return float((lacking / max(size, 1e-300)) ** 0.5)


@dataclass(frozen=True, slots=True)
class _Map:
    """What new rows are made of, for one penalty: `new = source sources^T + shift ones^T + before stay^T`, where a bias
    counts as one more column of `before` and of `new`."""

    sources: Tensor
    ones: Tensor
    stay: Tensor

    @classmethod
    def of(cls, sums: GramSums, share: float, bias: bool) -> _Map | None:
        """None where the sums are singular. `share`: the penalty as a part of their scale."""
        count = sums.gram.shape[0] - (not bias)
        gram = sums.gram[:count, :count].clone()
        penalty = torch.full_like(gram.diagonal(), share * sums.scale)
        if bias:
            penalty[-1] = share * gram[-1, -1]
        gram.diagonal().add_(penalty)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) != 0:
            return None
        wanted = torch.cat([sums.cross[:count], sums.gram[-1, :count, None], penalty.diag()], dim=1)
        found = torch.cholesky_solve(wanted, factor)
        width = sums.cross.shape[1]
        solved = cls(found[:, :width], found[:, width], found[:, width + 1 :])
        return solved if bool(found.isfinite().all()) else None

    def applied(self, member: int, source: Tensor, shift: Tensor | None, before: Tensor) -> Tensor:
        """`[rows, hidden]`, or one more with a bias, in float32 or wider."""
        kind = torch.promote_types(before.dtype, torch.float32)
        hidden = source.shape[1]
        own = self.sources[:, member * hidden : (member + 1) * hidden]
        new = source.to(kind) @ own.t().to(kind) + before.to(kind) @ self.stay.t().to(kind)
        return new if shift is None else new + torch.outer(shift.to(kind), self.ones.to(kind))


def check_memory(readers: Sequence[Reader], limit: int) -> None:
    """Raises `OptionError` where the sums and maps of a reader take more than `limit` bytes."""
    for reader in readers:
        needed = 8 * (5 + 3 * len(reader.sources)) * (reader.hidden + 1) ** 2
        if needed > limit:
            raise OptionError(
                f'memory_limit: {reader.name} take {needed:,} bytes, and the limit is {limit:,} (or sides="out")'
            )


def _out_in(stored: Tensor, transposed: bool) -> Tensor:
    return stored.t() if transposed else stored
