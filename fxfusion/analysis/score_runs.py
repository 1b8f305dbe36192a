"""The runs behind attention scores: which sums are needed, which are known, and how the others are measured.

Every number is a sum over the tokens of one sequence: of a loss without some layers' attention ("loss"), of a KL
divergence ("kl"), or of how far one layer's attention turns the stream, without some others' ("cosine"). FFNs and whole
decoder layers are measured likewise (`Unit`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import TokenBatch, measuring, model_device, require_causal
from fxfusion.analysis.measures import (
    WITH_REFERENCE,
    Directions,
    block_nodes,
    contribution,
    cosine_distance,
    pick,
    sums_by_sequence,
    token_measures,
)
from fxfusion.analysis.store import Store, check_batches, model_key
from fxfusion.errors import OptionError
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import Run, TracedGraph, TracedModel
from fxfusion.report.progress import reporting

Unit = Literal["attention", "ffn", "block"]
"""What of a layer is left out: its attention (or other mixer), its FFN, or all of it."""

UNITS: tuple[str, ...] = get_args(Unit)
_WORDS = {"attention": "attention", "ffn": "FFN", "block": "residual block"}
Layers = tuple[int, ...]
Address = tuple[str, Layers, int | None]
"""What was measured, without the attention of which layers, for which layer (None: for the whole model)."""


class ScoreCache(Store):
    """The sums, in memory and in a file:

        "loss without 3,7": [[812.1, 790.4, ...], ...]     one number for each sequence of each batch
        "cosine of 5 without 3": ...

    `model`: makes the digest of the model; `batches`: digests of the text, which may grow or shrink at its end. Names
    of another `unit` than attention begin with it. Raises `OptionError` where the file holds something else, or numbers
    of another model or text.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        model: Callable[[], str],
        batches: Sequence[str],
        unit: Unit = "attention",
    ) -> None:
        self._prefix = "" if unit == "attention" else f"{unit} "
        super().__init__(path, "a cache of attention scores", lambda: {"model": model()})
        known: Any = self.data.get("batches", [] if not self.data else None)
        values = self.data.get("values", {})
        lists = [known, *values.values()] if isinstance(values, dict) else [None]
        if not all(isinstance(found, list) for found in lists):
            raise self.broken("it has no lists of numbers")
        check_batches(known, batches, self.path)
        self.data = {"batches": list(known if len(known) > len(batches) else batches), "values": values}
        self._values: dict[str, list[list[float] | None]] = values

    def get(self, address: Address, batch: int) -> list[float] | None:
        """The sums of a batch, one for each sequence; None where they were not measured."""
        known = self._values.get(self._prefix + _key(address), [])
        return known[batch] if batch < len(known) else None

    def put(self, address: Address, batch: int, sums: list[float]) -> None:
        known = self._values.setdefault(self._prefix + _key(address), [])
        known.extend([None] * (batch + 1 - len(known)))
        known[batch] = sums
        self.changed()


def _key(address: Address) -> str:
    measure, dropped, layer = address
    of = "" if layer is None else f" of {layer}"
    without = f" without {','.join(map(str, sorted(dropped)))}" if dropped else ""
    return f"{measure}{of}{without}"


class ScoreRuns:
    """Sums for one model, text and method. `layers`: those that are scored; `names`: their module paths."""

    def __init__(
        self,
        model: nn.Module | TracedModel,
        batches: Sequence[TokenBatch],
        method: str,
        cache: str | os.PathLike[str] | None,
        layers: Iterable[int] | None,
        unit: Unit = "attention",
    ) -> None:
        self.method, self.batches, self.unit = method, batches, unit
        self.traced = model if isinstance(model, TracedModel) else TracedModel(model)
        self.model = self.traced.model
        model_device(self.model)  # refuses a model that cannot be measured
        self.cache = ScoreCache(cache, lambda: model_key(self.traced), [batch.key for batch in batches], unit)
        require_causal(self.model, batches[0].inputs)
        blocks = self._blocks(self.traced.graph(batches[0].inputs))
        self.layers = _wanted(layers, sorted({block.layer for block in blocks}), _WORDS[unit])
        self.names = {block.layer: block.name for block in reversed(blocks)}
        self._advance: Callable[[int], None] = lambda steps: None

    def _blocks(self, graph: TracedGraph, layers: Iterable[int] | None = None) -> tuple[ResidualBlock, ...]:
        """Those of the unit, of some layers or of all."""
        kinds = {"attention": graph.blocks.mixers, "ffn": graph.blocks.ffns, "block": graph.blocks.layers}
        wanted = None if layers is None else set(layers)
        return tuple(block for block in kinds[self.unit] if wanted is None or block.layer in wanted)

    def counts(self, measure: str) -> Tensor:
        """How many tokens of each sequence count: `int64 [sequences]`."""
        return torch.cat([(b.seen if measure == "cosine" else b.counted).sum(dim=1) for b in self.batches])

    @contextmanager
    def measuring(self, steps: int, progress: bool) -> Any:
        """No gradients, eval mode, and a progress bar over so many greedy steps: one layer fewer to score in each."""
        rounds = [len(self.layers) - step for step in range(max(1, steps))]
        per_batch = steps + 1 if self.method == "cosine" else sum(rounds)
        total = per_batch * len(self.batches)
        what = f"{_WORDS[self.unit]} scores ({self.method})"
        with self.cache, measuring(self.model), reporting(progress, what, total) as advance:
            self._advance = advance
            yield

    def scores(self, dropped: Layers, layers: Sequence[int], with_loss: bool = False) -> dict[int, Tensor]:
        """Sums `[sequences]` for each layer, when the attention of `dropped` is gone.

        "cosine": the turn of the stream. "loss", "kl": what is lost against the intact model without `dropped`
        and the layer. `with_loss`: measure the loss without `dropped` in the same runs.
        """
        for batch in self.batches:
            if self.method == "cosine":
                self._turns(batch, dropped, layers, with_loss)
            else:
                self._losses(batch, dropped, layers)
        if self.method == "cosine":
            return {layer: self._sums(("cosine", dropped, layer)) for layer in layers}
        return {layer: self.cost((*dropped, layer)) for layer in layers}

    def cost(self, dropped: Layers) -> Tensor:
        """What is lost without some attention, as measured before: sums `[sequences]`."""
        if self.method == "kl":
            return self._sums(("kl", dropped, None))
        return self._sums(("loss", dropped, None)) - self._sums(("loss", (), None))

    def _sums(self, address: Address) -> Tensor:
        parts = [self.cache.get(address, batch.number) for batch in self.batches]
        return torch.cat([torch.tensor(part, dtype=torch.float64) for part in parts if part is not None])

    def _turns(self, batch: TokenBatch, dropped: Layers, layers: Sequence[int], with_loss: bool) -> None:
        """One run gives the turn of every layer, and the loss if wanted."""
        wanted: list[Address] = [("cosine", dropped, layer) for layer in layers]
        wanted += [("loss", dropped, None)] if with_loss else []
        missing = [address for address in wanted if self.cache.get(address, batch.number) is None]
        if missing:
            graph = self.traced.graph(batch.inputs)
            turning = {layer: self._blocks(graph, [layer]) for _, _, layer in missing if layer is not None}
            keep = [node for blocks in turning.values() for node in _nodes_of_turn(blocks)]
            keep += [graph.logits] if with_loss else []
            run = graph.run(batch.inputs, keep, removed=self._blocks(graph, dropped))
            for layer, blocks in turning.items():
                sums = sums_by_sequence(_turn(run, blocks, batch.seen), batch.seen)
                self._put(("cosine", dropped, layer), batch, sums)
            if with_loss:
                self._put(("loss", dropped, None), batch, _loss(run[graph.logits], batch))
        self._advance(1)

    def _losses(self, batch: TokenBatch, dropped: Layers, layers: Sequence[int]) -> None:
        """One run for each layer, from that layer on."""
        missing = [
            layer for layer in layers if self.cache.get((self.method, (*dropped, layer), None), batch.number) is None
        ]
        self._advance(len(layers) - len(missing))
        lacks_intact = self.method == "loss" and self.cache.get(("loss", (), None), batch.number) is None
        if not missing and not lacks_intact:
            return
        graph = self.traced.graph(batch.inputs)
        starts = [block.before for block in self._blocks(graph, missing)]
        base = graph.run(batch.inputs, [graph.logits, *starts])
        reference = base[graph.logits]
        if lacks_intact:
            self._put(("loss", (), None), batch, _loss(reference, batch))
        if dropped:
            base = graph.run(batch.inputs, starts, removed=self._blocks(graph, dropped), base=base)
        for layer in missing:
            removed = self._blocks(graph, [layer])
            logits = graph.run(batch.inputs, [graph.logits], removed=removed, base=base)[graph.logits]
            sums = _loss(logits, batch) if self.method == "loss" else _divergence(logits, reference, batch)
            self._put((self.method, (*dropped, layer), None), batch, sums)
            self._advance(1)

    def _put(self, address: Address, batch: TokenBatch, sums: Tensor) -> None:
        if not sums.isfinite().all():
            raise ValueError(f"{_words(address, self.names, _WORDS[self.unit])} is not finite in batch {batch.number}")
        self.cache.put(address, batch.number, sums.tolist())


def _wanted(layers: Iterable[int] | None, have: Sequence[int], what: str) -> Layers:
    if not have:
        raise ValueError(f"the model has no {what} left to score")
    wanted = tuple(have) if layers is None else tuple(sorted(set(layers)))
    missing = sorted(set(wanted) - set(have))
    if missing or not wanted:
        raise OptionError(f"there is no {what} to score in layers {missing}; it is in layers {list(have)}")
    return wanted


def _words(address: Address, names: dict[int, str], what: str) -> str:
    measure, dropped, layer = address
    without = f" without the {what} of layers {sorted(dropped)}" if dropped else ""
    if layer is not None:
        return f"the stream at {names[layer]} (layer {layer}){without}"
    return f"the {'loss' if measure == 'loss' else 'KL divergence'}{without}"


def _nodes_of_turn(blocks: Sequence[ResidualBlock]) -> list[Any]:
    return [blocks[0].stream, *(node for block in blocks for node in block_nodes(block))]


def _turn(run: Run, blocks: Sequence[ResidualBlock], seen: Tensor) -> Tensor:
    """1 - cos(x, x + what the layer's mixers add): `[tokens]`."""
    for block in blocks:
        if not block.branches and block.before is not block.stream:
            raise OptionError(
                f"{block.name} is scaled together with the FFN beside it, so what it adds to the stream alone cannot "
                'be read off; use method="loss" or "kl"'
            )
    stream = pick(run[blocks[0].stream], seen)
    added = [contribution(run, block, seen) for block in blocks]
    return cosine_distance(Directions.of(stream), Directions.of(sum(added, stream)))


def _loss(logits: Tensor, batch: TokenBatch) -> Tensor:
    return _sums(batch, lambda: token_measures(logits[:, :-1], batch.targets, batch.counted)[:, 0])


def _divergence(logits: Tensor, reference: Tensor, batch: TokenBatch) -> Tensor:
    column = WITH_REFERENCE.index("kl")
    return _sums(
        batch, lambda: token_measures(logits[:, :-1], batch.targets, batch.counted, reference[:, :-1])[:, column]
    )


def _sums(batch: TokenBatch, measured: Callable[[], Tensor]) -> Tensor:
    if not batch.counted.any():
        return torch.zeros(len(batch.counted), dtype=torch.float64)
    return sums_by_sequence(measured(), batch.counted)
