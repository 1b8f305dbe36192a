"""Two models side by side on the same text: what a layer reads, and what its result lacks to meet the reference.

    h [tokens, width]          input of the layer in the model as it is now
    r [tokens, hidden]         (reference's stream - the model's stream after the layer) / scale

Layers are asked for from first to last. Between them the stream of each batch is kept, where memory allows, so that no
layer is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxfusion.analysis.batches import TokenBatch
from fxfusion.errors import FxFusionError
from fxfusion.models.traced import Run, TracedGraph, TracedModel
from fxfusion.passes.ffn import Linear
from fxfusion.recovery.projections import Projection, Site, Target, linears_of, scale_of, sites, target_of
from fxfusion.recovery.readers import Reader, aim_of, anchor_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One batch's tokens that count. `inputs`: `[tokens, width]`, `lacking`: `[tokens, hidden]`, in the units of the
    layer's result; `scale`: what makes stream units of these, one number or `[hidden]`; `size`: sum of the squares of
    the reference's stream."""

    inputs: Tensor
    lacking: Tensor
    scale: Tensor | float
    size: float


class _Passing:
    """One model on all batches, going on from the stream that was kept."""

    def __init__(self, model: TracedModel, batches: Sequence[TokenBatch], room: int) -> None:
        self.model, self.room = model, room
        self.kept: list[Run | None] = [None] * len(batches)

    def values(
        self, number: int, graph: TracedGraph, batch: TokenBatch, wanted: list[fx.Node], keep: fx.Node, *more: fx.Node
    ) -> Run:
        """`keep`: the stream to go on from; `more`: what saves some of that way, kept too where there is room."""
        run = graph.run(batch.inputs, keep=[*wanted, keep, *more], base=self.kept[number])
        fitting = next((kept for kept in ([keep, *more], [keep]) if self._fits(run, kept)), None)
        self.kept[number] = None if fitting is None else run.keeping(fitting)
        return run

    def _fits(self, run: Run, kept: Sequence[fx.Node]) -> bool:
        values = [run.values[node] for node in (*kept, *run.shared)]
        size = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
        return size * len(self.kept) <= self.room


class Streams:
    """`traced`: the model as it is now; its weights may change between two layers. `room`: bytes that kept streams may
    take. `advance(1)` is called after each batch.
    """

    def __init__(
        self,
        traced: TracedModel,
        reference: TracedModel,
        batches: Sequence[TokenBatch],
        room: int,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        self.batches, self.room, self.advance = batches, room, advance
        self.traced = traced
        self._own, self._reference = _Passing(self.traced, batches, room // 2), _Passing(reference, batches, room // 4)
        self._aims: dict[int, tuple[Target, Tensor]] = {}
        self._sites: dict[int, list[Site]] = {}
        self._known: dict[int, dict[str, Linear]] = {}

    @property
    def tokens(self) -> int:
        """How many count."""
        return sum(int(batch.seen.sum()) for batch in self.batches)

    def graph(self, number: int = 0) -> TracedGraph:
        """The model's graph for a batch."""
        return self.traced.graph(self.batches[number].inputs)

    def rows(self, projection: Projection) -> Iterator[Rows]:
        """For each batch in turn. Raises `FxFusionError` where a value is not finite, naming batch and layer."""
        for number, batch in enumerate(self.batches):
            yield self._rows(number, batch, projection)
            self.advance(1)

    def entries(self, reader: Reader) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each batch in turn what the block's first layers read now, and what each member's read in the reference,
        all `[tokens, hidden]`. Raises `FxFusionError` where a value is not finite."""
        for number, batch in enumerate(self.batches):
            graph, other = self.graph(number), self._reference.model.graph(batch.inputs)
            site, linears = self._site(graph, reader), self._linears(other)
            wanted = [linears[source].input for source in reader.sources]
            own = self._own.values(number, graph, batch, [site.entries[0].input], site.before)
            values = self._reference.values(number, other, batch, wanted, anchor_of(reader, other))
            seen = batch.seen.reshape(-1)
            kind = torch.promote_types(own[site.entries[0].input].dtype, torch.float32)
            now = _tokens(own[site.entries[0].input], seen, kind)
            found = [_tokens(values[node], seen, kind).to(now.device) for node in wanted]
            _check_finite(reader.name, batch, {"the input": [now], "the reference's input": found})
            yield now, found
            self.advance(1)

    def distance(self, reader: Reader) -> tuple[float, float]:
        """Sums of squares over all tokens: of what the stream after the block lacks to meet the reference's, and of the
        latter. Where the reference has no such stream (`reader.target` is None): of what the block adds to it."""
        lacks = whole = 0.0
        for number, batch in enumerate(self.batches):
            graph, other = self.graph(number), self._reference.model.graph(batch.inputs)
            site, aim = self._site(graph, reader), aim_of(reader, other)
            own = self._own.values(number, graph, batch, [site.after], site.before)
            seen = batch.seen.reshape(-1)
            kind = torch.promote_types(own[site.after].dtype, torch.float32)
            target = self._target(number, batch, aim, seen, kind)
            now = _tokens(own[site.after], seen, kind)
            if reader.target is None:
                now = now - _tokens(own[site.before], seen, kind)
            lacks += float((target - now.to(target.device)).square().sum(dtype=torch.float64))
            whole += float(target.square().sum(dtype=torch.float64))
            self.advance(1)
        return lacks, whole

    def _linears(self, graph: TracedGraph) -> Mapping[str, Linear]:
        if id(graph) not in self._known:
            self._known[id(graph)] = linears_of(self._reference.model.model, graph)
        return self._known[id(graph)]

    def _rows(self, number: int, batch: TokenBatch, projection: Projection) -> Rows:
        graph, other = self.graph(number), self._reference.model.graph(batch.inputs)
        site, aim = self._site(graph, projection), target_of(projection, other)
        # What the layer reads is kept too: once it is refitted only its own product has to be computed again.
        own = self._own.values(number, graph, batch, [site.after], site.before, site.linear.input)
        kind = torch.promote_types(own[site.linear.input].dtype, torch.float32)
        seen = batch.seen.reshape(-1)
        target = self._target(number, batch, aim, seen, kind)
        now = _tokens(own[site.after], seen, kind)
        scale = scale_of(site, graph, batch.inputs)
        inputs = _tokens(own[site.linear.input], seen, kind)
        lacking = target - now.to(target.device)
        _check_finite(projection.name, batch, {"the input": [inputs], "the stream after it": [lacking]})
        return Rows(
            inputs=inputs,
            lacking=_divided(lacking.to(inputs.device), scale),
            scale=scale,
            size=float(target.square().sum(dtype=torch.float64)),
        )

    def _target(self, number: int, batch: TokenBatch, aim: Target, seen: Tensor, kind: torch.dtype) -> Tensor:
        """What the stream should be, kept until another one is asked for, where there is room."""
        known = self._aims.get(number)
        if known is not None and known[0] == aim:
            return known[1]
        graph = self._reference.model.graph(batch.inputs)
        values = self._reference.values(number, graph, batch, [*aim.plus, *aim.minus], aim.keep)
        target = _sum_of(aim, values, seen, kind)
        self._aims.pop(number, None)
        if target.numel() * target.element_size() * len(self.batches) <= self.room // 4:
            self._aims[number] = aim, target
        return target

    def _site(self, graph: TracedGraph, projection: Projection | Reader) -> Site:
        if id(graph) not in self._sites:
            self._sites[id(graph)] = sites(graph)
        return self._sites[id(graph)][projection.place]


def _sum_of(aim: Target, values: Run, seen: Tensor, kind: torch.dtype) -> Tensor:
    first, *others = (_tokens(values[node], seen, kind) for node in aim.plus)
    return sum(others, first) - sum(_tokens(values[node], seen, kind) for node in aim.minus)


def _check_finite(name: str, batch: TokenBatch, values: Mapping[str, Sequence[Tensor]]) -> None:
    for what, found in values.items():
        # A sum is finite only if all values are, and cheaper; one that is not can be too large.
        if not all(bool(value.sum().isfinite()) or bool(value.isfinite().all()) for value in found):
            raise FxFusionError(f"{name}: {what} is not finite in batch {batch.number}: nothing to fit")


def _tokens(value: Tensor, seen: Tensor, kind: torch.dtype) -> Tensor:
    flat = value.reshape(-1, value.shape[-1])
    return flat.to(kind) if bool(seen.all()) else flat[seen.to(flat.device)].to(kind)


def _divided(lacking: Tensor, scale: Tensor | float) -> Tensor:
    """Channels whose scale is zero lack nothing that the layer could give."""
    if not isinstance(scale, Tensor):
        return lacking if scale == 1.0 else lacking / scale
    scale = scale.to(lacking)
    return torch.where(scale == 0, torch.zeros_like(lacking), lacking / torch.where(scale == 0, 1.0, scale))
