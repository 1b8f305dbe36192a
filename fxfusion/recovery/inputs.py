"""The other side of a refit: what reads the stream first is fitted to what it would have read in the reference.

    s [tokens, hidden]       the normed stream that gate and up (or q, k and v) of the fused model read now
    n_i [tokens, hidden]     what those of member i read in the reference
    W s + b  should be  W_i n_i + b_i          W: member i's rows of the wide layer; W_i, b_i: the reference's layer

    W = argmin || n_i W_i^T - s W^T ||^2 + penalty || W - W0 ||^2  =  W_i M^T,   M = argmin || n_i - s M^T ||^2 + ...

so sums over tokens are of `[hidden, hidden]`, however wide the layers are. Much of what a member's stream lacks is
linear in what is there; shapes and speed stay. The penalty is the one whose layers come nearest on text for validation,
by sums of it; whether anything is changed is decided by the stream after the block there. An approximation, measured
like the other side (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxfusion.errors import OptionError
from fxfusion.models.weight_grid import WeightGrid
from fxfusion.recovery.fit import DAMPING, Fitted
from fxfusion.recovery.gram import GramSums
from fxfusion.recovery.readers import Part, Reader
from fxfusion.recovery.streams import Streams

_SAMPLE = 256  # channels of a part's results that a penalty is judged by
_TRIED = 2  # penalties on the stream itself, the likeliest first


@dataclass(slots=True, kw_only=True)
class InputFitter:
    """`model`: what is refitted; `source`: the model as it was loaded. `calibration`: what is fitted to; `validation`:
    what decides. `grid`, `exact`: as of `Fitter`."""

    model: nn.Module
    source: nn.Module
    calibration: Streams
    validation: Streams
    penalties: Sequence[float]
    grid: WeightGrid | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def fit(self, reader: Reader) -> Fitted:
        """Refit one block's first layers in place; they stay as they are where that is no better."""
        if reader.refused:
            error = self._error(reader)
            return Fitted(penalty=None, before=error, after=error, applied=False, parts=1, why=reader.refused)
        own = {name: self.model.get_parameter(name) for name in reader.parameters}
        kept = {name: value.detach().clone() for name, value in own.items()}
        old = {name: self.exact.get(name, value) for name, value in kept.items()}
        device = own[reader.parts[0].weight].device
        sums = GramSums(reader.hidden + 1, reader.hidden * len(reader.sources), device, bias=True)
        for now, wanted in self.calibration.entries(reader):
            sums.add(_with_ones(now), torch.cat(wanted, dim=1))
        # Before the block's end is computed: the streams would have gone on from here.
        gram = self._held_out(reader) if len(self.penalties) > 1 else None
        before = self._error(reader)
        found = [(share, maps) for share in self.penalties if (maps := _maps(sums, share, reader)) is not None]
        tried: list[tuple[float | None, _Maps]] = [*self._likeliest(reader, found, old, gram)[:_TRIED]]
        if self.grid is not None and (still := _maps(sums, None, reader)) is not None:
            tried.append((None, still))
        for share, maps in tried:
            for part in reader.parts:
                self._put(part, maps[part.bias is not None], own, old)
            after = self._error(reader)
            if after < before:
                return Fitted(penalty=share, before=before, after=after, applied=True, parts=1)
        for name, value in own.items():
            value.copy_(kept[name])
        why = "no penalty was better on the text for validation" if found else "its sums are singular"
        return Fitted(penalty=None, before=before, after=before, applied=False, parts=1, why=why)

    def _held_out(self, reader: Reader) -> Tensor:
        """Sums over the text for validation: of products of all channels that are read now, a constant one and all that
        each member should read."""
        rows = (torch.cat([_with_ones(now), *wanted], dim=1) for now, wanted in self.validation.entries(reader))
        first, *others = ((own.t() @ own).double() for own in rows)
        return sum(others, first)

    def _likeliest(
        self,
        reader: Reader,
        found: Sequence[tuple[float, _Maps]],
        old: Mapping[str, Tensor],
        gram: Tensor | None,
    ) -> Sequence[tuple[float, _Maps]]:
        """The penalties in the order of how near their layers come to the reference's on the text for validation, by
        sums alone: of each part's results a sample of channels, as a part of their size."""
        if gram is None:
            return found
        errors = [0.0] * len(found)
        for part in reader.parts:
            source, shift, before = (
                None if value is None else value[:: -(-len(value) // _SAMPLE)] for value in self._values(part, old)
            )
            assert source is not None and before is not None
            columns = slice(reader.hidden * (part.member + 1) + 1, reader.hidden * (part.member + 2) + 1)
            wanted_rows = gram.new_zeros(len(source), len(gram))
            wanted_rows[:, columns] = source.double()
            if shift is not None:
                wanted_rows[:, reader.hidden] = shift.double()
            size = max(float(((wanted_rows @ gram) * wanted_rows).sum()), 1e-300)
            for number, (_, maps) in enumerate(found):
                new = maps[part.bias is not None].applied(part.member, source, shift, before)
                lacking = wanted_rows.clone()
                lacking[:, : new.shape[1]] -= new.double()
                errors[number] += float(((lacking @ gram) * lacking).sum()) / size
        return [found[number] for number in sorted(range(len(found)), key=errors.__getitem__)]

    def _values(self, part: Part, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of a part's rows: the reference's weight and bias, and what they are before the refit, a bias as one more
        column."""
        before = _out_in(old[part.weight], part.transposed)[part.rows]
        source = _out_in(self.source.get_parameter(part.source), part.source_transposed)[part.source_rows]
        shift = None if part.source_bias is None else self.source.get_parameter(part.source_bias)[part.source_rows]
        if part.bias is not None:
            before = torch.cat([before, old[part.bias][part.rows][:, None]], dim=1)
        return source, shift, before

    def _put(self, part: Part, found: _Map, own: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Give the rows of a part their new values."""
        source, shift, before = self._values(part, old)
        new = found.applied(part.member, source, shift, before)
        hidden = source.shape[1]
        rows = new[:, :hidden] if self.grid is None else self.grid.fed_back(new[:, :hidden], found.factor)
        _out_in(own[part.weight], part.transposed)[part.rows] = rows.to(before.dtype)
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
    counts as one more column of `before` and of `new`. `factor`: Cholesky's, of what was solved."""

    sources: Tensor
    ones: Tensor
    stay: Tensor
    factor: Tensor

    @classmethod
    def of(cls, sums: GramSums, share: float | None, bias: bool) -> _Map | None:
        """None where the sums are singular. `share`: the penalty as a part of their scale; None: nothing is fitted."""
        count, width = sums.gram.shape[0] - (not bias), sums.cross.shape[1]
        factor = sums.factor(DAMPING if share is None else share)
        if factor is None:
            return None
        factor = factor[:count, :count]
        if share is None:
            nothing = sums.cross.new_zeros(count, width)
            return cls(nothing, nothing[:, 0], torch.eye(count).to(nothing), factor)
        penalty = sums.penalty(share)[:count]
        wanted = torch.cat([sums.cross[:count], sums.gram[-1, :count, None], penalty.diag()], dim=1)
        found = torch.cholesky_solve(wanted, factor)
        solved = cls(found[:, :width], found[:, width], found[:, width + 1 :], factor)
        return solved if bool(found.isfinite().all()) else None

    def applied(self, member: int, source: Tensor, shift: Tensor | None, before: Tensor) -> Tensor:
        """`[rows, hidden]`, or one more with a bias, in float32 or wider."""
        kind = torch.promote_types(before.dtype, torch.float32)
        hidden = source.shape[1]
        own = self.sources[:, member * hidden : (member + 1) * hidden]
        new = source.to(kind) @ own.t().to(kind) + before.to(kind) @ self.stay.t().to(kind)
        return new if shift is None else new + torch.outer(shift.to(kind), self.ones.to(kind))


_Maps = Mapping[bool, _Map]  # for layers without a bias, and with one


def _maps(sums: GramSums, share: float | None, reader: Reader) -> _Maps | None:
    """None where the sums are singular."""
    found = {bias: _Map.of(sums, share, bias) for bias in {part.bias is not None for part in reader.parts}}
    known = {bias: one for bias, one in found.items() if one is not None}
    return known if sums.scale > 0 and len(known) == len(found) else None


def check_memory(readers: Sequence[Reader], penalties: int, limit: int) -> None:
    """Raises `OptionError` where the sums of a reader, and its maps for so many penalties, take more than `limit`
    bytes."""
    for reader in readers:
        width = len(reader.sources) + 1
        held_out = 2 * width**2 if penalties > 1 else 0
        needed = 8 * (reader.hidden + 1) ** 2 * (width * (penalties + 2) + 1 + held_out)
        if needed > limit:
            raise OptionError(
                f'memory_limit: {reader.name} take {needed:,} bytes, and the limit is {limit:,} (or sides="out")'
            )


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)


def _out_in(stored: Tensor, transposed: bool) -> Tensor:
    return stored.t() if transposed else stored
