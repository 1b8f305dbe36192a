"""How much each block depends on each earlier one: the dependency matrix of FFN Fusion.

With h_j(X) = f_j(X) - X what block j adds to the stream, and h_j^i the same in the model without block i:

    M[i, j] = cosine distance of h_j and h_j^i, mean over tokens          row: removed, column: measured

Small means that block j does nearly the same without block i, so that the two may run in parallel.

    cosine[j] = cos(X, f_j(X))     ratio[j] = |h_j(X)| / |X|     contribution_cosine[j] = cos(h_j(X), X)

Cost: one run of the model, and for row i the blocks after i: about (L + 1) / 2 runs for L blocks, where a
computation row by row takes L. Source: A. Bercovich et al., arXiv 2503.18908, sections 3 and 5.5, figure 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import Batch, TokenBatch, measuring, model_device, read_batches, require_causal
from fxfusion.analysis.measures import Directions, block_nodes, contribution, cosine_distance, pick
from fxfusion.analysis.store import Store, check_batches, inside, model_key
from fxfusion.errors import OptionError
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.report.plain import table
from fxfusion.report.progress import reporting

Unit = Literal["ffn", "block"]

_FINISHED = "matrix.json"
_BY_BLOCK = ("cosine", "ratio", "contribution_cosine")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DependencyMatrix:
    """What `dependency_matrix` measured.

    `values`: `[L, L]`, row = removed block, column = measured block, zero on and below the diagonal. `layers`:
    numbers of the decoder layers that hold the blocks, `names` their module paths. `cosine`, `ratio`,
    `contribution_cosine`: `[L]`. All float32. `attention`: layers that have attention; `dropped_attention`:
    those that had it until it was left out for this matrix. Means are over so many `tokens` and `sequences`.
    """

    values: Tensor
    layers: tuple[int, ...]
    names: tuple[str, ...]
    unit: Unit
    cosine: Tensor
    ratio: Tensor
    contribution_cosine: Tensor
    attention: tuple[int, ...]
    dropped_attention: tuple[int, ...]
    tokens: int
    sequences: int

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `matrix.json` and a safetensors file. Raises `OptionError` where that cannot be done."""
        store = _finished(folder)
        store.data = {"tensors": store.keep(self._tensors()), **self._facts()}
        store.save()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DependencyMatrix:
        """Read what `save` wrote, bit by bit. Raises `OptionError` where it is not there or not whole."""
        store = _finished(folder)
        if not store.data:
            raise OptionError(f"there is no dependency matrix in {folder}: {_FINISHED} is missing")
        facts = dict(store.data)
        values: dict[str, Any] = {**store.tensors(facts.pop("tensors", None)), **facts}
        if values.keys() != {field.name for field in fields(cls)}:
            raise OptionError(f"{folder} holds no dependency matrix: its fields are {sorted(values)}")
        for name, value in facts.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**self._facts(), **{name: value.tolist() for name, value in self._tensors().items()}}

    def __str__(self) -> str:
        rows = [
            (layer, *("" if column <= row else f"{float(value):.3f}" for column, value in enumerate(values)))
            for row, (layer, values) in enumerate(zip(self.layers, self.values.tolist(), strict=True))
        ]
        note = f"cosine distance of what a layer's {self.unit} computes without that of an earlier one (row); "
        return table(["without", *map(str, self.layers)], rows, f"{note}{self.tokens:,} tokens")

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("values", *_BY_BLOCK)}

    def _facts(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("layers", "names", "attention", "dropped_attention")}
        return {"unit": self.unit, "tokens": self.tokens, "sequences": self.sequences, **lists}


def _finished(folder: str | os.PathLike[str]) -> Store:
    return Store(Path(folder) / _FINISHED, "a dependency matrix")


class MatrixState:
    """Sums over the batches measured so far, in a folder or in memory. `done`: number of these batches.

    `facts`: what it must be about; `batches`: digests of the text. Raises `OptionError` where the folder holds
    something else.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, facts: Callable[[], dict[str, Any]], batches: Sequence[str]
    ) -> None:
        path = None if folder is None else Path(folder)
        if path is not None and path.exists() and not path.is_dir():
            raise OptionError(f"resume must name a folder, {path} is a file")
        what = "the state of a dependency matrix"
        self._store, self._batches = Store(inside(path, "state.json"), what, facts), batches
        known, self.sums = self._store.data.get("batches", []), dict[str, Tensor]()
        if not isinstance(known, list):
            raise self._store.broken("batches is no list of digests")
        check_batches(known, batches, path)
        if len(known) > len(batches):
            raise OptionError(f"{path} holds the sums over {len(known)} batches, more than the {len(batches)} given")
        self.done = len(known)
        if known:
            self.sums = self._store.tensors(self._store.data.get("sums"))

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the sums over one more batch, and write."""
        self.sums = {name: self.sums[name] + value if self.sums else value for name, value in sums.items()}
        self.done += 1
        self._store.data = {"batches": list(self._batches[: self.done]), "sums": self._store.keep(self.sums)}
        self._store.save()


def dependency_matrix(
    model: nn.Module | TracedModel,
    batches: Iterable[Batch],
    *,
    unit: Unit = "ffn",
    dropped_attention: Iterable[int] = (),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> DependencyMatrix:
    """Measure how much each FFN (or whole decoder layer) depends on the earlier ones. The model is not changed.

    Args:
        model: a causal language model that `torch.compile` captures as one graph; it runs in eval mode. A
            `TracedModel` saves capturing it again.
        batches: `input_ids` tensors `[batch, seq]`, or dicts of model inputs. Tokens that are padding in
            `attention_mask` or -100 in `labels` do not count. The streams of one batch are held at a time.
        unit: "ffn" for the FFNs that could be fused, "block" for whole decoder layers.
        dropped_attention: measure the model without the attention of these layers.
        resume: a folder that keeps the sums after each batch; a later call with the same model and text goes
            on from there, to the same bits, and batches may be added at the end.
        progress: say how far it is, on the error stream.

    Raises:
        OptionError: an unknown unit, a layer without attention to drop, a folder with another measurement.
        CaptureError: a model that is not one graph.
        ValueError: no batches, nothing in them that counts, no such blocks, a value that is not finite, a model
            on `meta` or one that is not causal.
    """
    if unit not in get_args(Unit):
        raise OptionError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")
    traced = TracedModel(model, dropped_attention)
    model_device(traced.model)  # refuses a model that cannot be measured
    read = read_batches(batches)
    require_causal(traced.model, read[0].inputs)
    graph = traced.graph(read[0].inputs)
    blocks = blocks_of(graph, unit)
    facts = {"unit": unit, "dropped_attention": list(traced.dropped_attention), "layers": [b.layer for b in blocks]}
    state = MatrixState(resume, lambda: {**facts, "model": model_key(traced)}, [batch.key for batch in read])
    rows = len(read) * len(blocks)
    done, what = state.done * len(blocks), f"dependency matrix ({unit})"
    with measuring(traced.model), reporting(progress, what, rows, done=done) as advance:
        for batch in read[state.done :]:
            state.add(measure_batch(traced.graph(batch.inputs), batch, unit, advance))
    tokens = sum(int(batch.seen.sum()) for batch in read)
    means: dict[str, Any] = {name: (total / tokens).float() for name, total in state.sums.items()}
    return DependencyMatrix(
        **means,
        layers=tuple(block.layer for block in blocks),
        names=tuple(block.name for block in blocks),
        unit=unit,
        attention=tuple(sorted({block.layer for block in graph.blocks.mixers})),
        dropped_attention=traced.dropped_attention,
        tokens=tokens,
        sequences=sum(int(batch.seen.any(dim=1).sum()) for batch in read),
    )


def blocks_of(graph: TracedGraph, unit: Unit) -> tuple[ResidualBlock, ...]:
    """The blocks of one kind, one for each layer at most. Raises ValueError where there are none, or more."""
    blocks = graph.blocks.ffns if unit == "ffn" else graph.blocks.layers
    layers = [block.layer for block in blocks]
    if not layers:
        hint = " (beside attention, none can; see dropped_attention)" if graph.blocks.mixers else ""
        raise ValueError(f'the model has no FFN that could be fused{hint}; unit="block" measures whole layers')
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"layers {repeated} hold several such blocks, or run several times: a row would be ambiguous")
    return blocks


def measure_batch(
    graph: TracedGraph, batch: TokenBatch, unit: Unit, advance: Callable[[int], None] = lambda steps: None
) -> dict[str, Tensor]:
    """Sums over the tokens of one batch, float64: `values` `[L, L]` and the others `[L]`, as in `DependencyMatrix`.

    `advance(1)` is called after each row.
    """
    blocks = blocks_of(graph, unit)
    nodes = [node for block in blocks for node in block_nodes(block)]
    intact = graph.run(batch.inputs, [*nodes, *(block.before for block in blocks)])
    own, sums = [], {name: torch.zeros(len(blocks), dtype=torch.float64) for name in _BY_BLOCK}
    for place, block in enumerate(blocks):
        added = contribution(intact, block, batch.seen)
        own.append(Directions.of(added))
        for name, total in _compare(pick(intact[block.stream], batch.seen), added).items():
            _check(total, f"{name} of {block.name}", batch)
            sums[name][place] = total
    base = intact.keeping(block.before for block in blocks)
    del intact
    sums["values"] = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    for row, removed in enumerate(blocks[:-1]):
        later = blocks[row + 1 :]
        run = graph.run(batch.inputs, [node for block in later for node in block_nodes(block)], [removed], base)
        for column, block in enumerate(later, start=row + 1):
            distance = cosine_distance(own[column], Directions.of(contribution(run, block, batch.seen)))
            total = distance.sum(dtype=torch.float64)
            _check(total, f"what {block.name} adds without {removed.name}", batch)
            sums["values"][row, column] = total
        advance(1)
    advance(1)
    return sums


def _compare(stream: Tensor, added: Tensor) -> dict[str, Tensor]:
    """Sums over tokens of what a block adds, against the stream that it reads."""
    xx, hh, xh = (torch.linalg.vecdot(*pair).double() for pair in ((stream, stream), (added, added), (stream, added)))
    after = (xx + 2 * xh + hh).clamp_min(0.0)  # |x + h|^2
    measured = {
        "cosine": _cosine(xx + xh, xx * after),
        "ratio": torch.where(hh == 0, 0.0, (hh / xx).sqrt()),
        "contribution_cosine": _cosine(xh, xx * hh),
    }
    return {name: value.sum() for name, value in measured.items()}


def _cosine(product: Tensor, squares: Tensor) -> Tensor:
    """u . v / |u| |v|, 0 where a vector is zero. `squares`: |u|^2 |v|^2."""
    return torch.where(squares == 0, 0.0, product / squares.sqrt())


def _check(total: Tensor, what: str, batch: TokenBatch) -> None:
    if not total.isfinite():
        raise ValueError(f"{what} is not finite in batch {batch.number}")
