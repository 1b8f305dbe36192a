"""What others do to a model of L layers so that it is shorter, each by its paper's rule, in the captured graph.

| method | what goes | chosen by | source |
|---|---|---|---|
| pairs | a run of layers, two by two in parallel | least loss of all such runs | Layer Parallelism 2502.02790 |
| shortgpt | whole blocks | least 1 - cos(input, output) | ShortGPT 2403.03853 |
| sleb | whole blocks | least loss, one after the other | SLEB 2402.09025 |
| llm-drop | attention | least 1 - cos(x, x + attention) | LLM-Drop 2406.15786 |
| ffn-drop | FFNs | least 1 - cos(x, x + ffn) | LLM-Drop 2406.15786, section on MLPs |
| replaceme | one run of blocks, for one linear map | least 1 - cos(before, after) | ReplaceMe 2505.02819 |

A pair in parallel: both attentions read the same stream x, both FFNs the stream after both attentions. So it is a wide
window of two layers. ReplaceMe keeps the FFN of the layer before the run, and multiplies what it adds by a matrix T:

    T = argmin || M T + Y - Z ||^2
    M [tokens, hidden]: what that FFN adds; Y: the stream before it; Z: the stream after the run

which goes into its down projection, so that it costs nothing to run. All but FFNs that go and T are plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxfusion.analysis.batches import Batch, TokenBatch, measuring, read_batches
from fxfusion.analysis.measures import pick
from fxfusion.compiler.capture import CapturedGraph
from fxfusion.errors import OptionError
from fxfusion.graph.editor import erase_dead_code
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import PlannedGroup
from fxfusion.report.progress import each

_MAP = "fxfusion_linear_map"
_JITTER = 1e-7  # of the Gram matrix's mean diagonal, so that it can be solved where tokens are few


class EditedModel:
    """`edited(input_ids)` gives the logits `[batch, seq, vocabulary]` without some layers, without the FFNs of others,
    and with what one layer's FFN adds multiplied by a matrix. The model stays as it is.

    Args:
        removed: layers that go whole. ffns: layers whose FFN goes. mapped: a layer and `[hidden, hidden]`, for rows.

    Raises `OptionError` where a layer has no such part, or its FFN no place of its own in the stream.
    """

    def __init__(
        self,
        traced: TracedModel,
        removed: Iterable[int] = (),
        ffns: Iterable[int] = (),
        mapped: tuple[int, Tensor] | None = None,
    ) -> None:
        self.traced, self.removed, self.ffns, self.mapped = traced, tuple(removed), tuple(ffns), mapped
        self._programs: dict[int, CapturedGraph] = {}

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        batch = {"input_ids": input_ids, **inputs}
        graph = self.traced.graph(batch)
        if id(graph) not in self._programs:
            self._programs[id(graph)] = self._edited(graph)
        with torch.no_grad():
            logits: Tensor = self._programs[id(graph)].module(*graph.inputs(batch).values())
        return logits

    def _edited(self, graph: TracedGraph) -> CapturedGraph:
        work = graph.captured.copy()
        own = work.module.graph
        copies: dict[str, fx.Node] = {node.name: node for node in own.nodes}
        own.output_node().args = (copies[graph.logits.name],)
        if self.mapped is not None:
            layer, matrix = self.mapped
            block = ffn_of(graph, layer)
            branch, add = copies[_branch(block).name], copies[block.after.name]
            work.module.register_buffer(_MAP, matrix)
            with own.inserting_after(branch):
                value = own.get_attr(_MAP)
            with own.inserting_after(value):
                product = own.call_function(torch.matmul, (branch, value))
            add.replace_input_with(branch, product)
        gone = [*(ffn_of(graph, layer) for layer in self.ffns), *graph.parts_of((), self.removed)]
        order = {node: place for place, node in enumerate(graph.captured.module.graph.nodes)}
        for block in sorted(gone, key=lambda one: order[one.after], reverse=True):
            copies[block.after.name].replace_all_uses_with(copies[block.before.name])
        erase_dead_code(own)
        own.lint()
        work.module.recompile()
        return work


def ffn_of(graph: TracedGraph, layer: int) -> ResidualBlock:
    """The FFN of a layer. Raises `OptionError` where there is none of its own, or several."""
    found = [block for block in graph.blocks.ffns if block.layer == layer]
    if len(found) != 1:
        raise OptionError(f"layer {layer} has {len(found)} FFNs of their own place in the stream, one is needed")
    return found[0]


def _branch(block: ResidualBlock) -> fx.Node:
    """What an FFN adds. Raises `OptionError` where something follows it before the stream."""
    if len(block.branches) != 1:
        raise OptionError(f"{block.name}: what it adds is scaled or normed before the stream, so no map fits into it")
    return block.branches[0]


# --- what is chosen -----------------------------------------------------------------------------------


def pairs_from(first: int, pairs: int) -> FusionPlan:
    """So many pairs of layers in parallel, from layer `first` on."""
    starts = range(first, first + 2 * pairs, 2)
    return FusionPlan(groups=[PlannedGroup((start, start + 1), "wide") for start in starts])


def run_distances(traced: TracedModel, batches: Sequence[Batch], progress: bool = False) -> Tensor:
    """`[L + 1, L + 1]` float64: the mean of 1 - cos(stream before layer i, stream before layer j) over tokens, zero
    for j <= i; L stands for the stream after the last layer."""
    read = read_batches(batches)
    layers = len(traced.graph(read[0].inputs).blocks.layers)
    total = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    with measuring(traced.model):
        for batch in each(read, progress, "how far runs of layers turn the stream"):
            streams = _streams(traced, batch)
            for one in range(layers):
                for other in range(one + 1, layers + 1):
                    cosine = torch.cosine_similarity(streams[one], streams[other], dim=-1)
                    total[one, other] += (1 - cosine).sum(dtype=torch.float64).cpu()
    return total / sum(int(batch.seen.sum()) for batch in read)


def _streams(traced: TracedModel, batch: TokenBatch) -> list[Tensor]:
    """Before each layer and after the last: `[tokens, hidden]` each."""
    graph = traced.graph(batch.inputs)
    nodes = [*(block.before for block in graph.blocks.layers), graph.blocks.layers[-1].after]
    run = graph.run(batch.inputs, nodes)
    return [pick(run[node], batch.seen).float() for node in nodes]


def flattest_run(distances: Tensor, length: int) -> int:
    """The first of so many layers in a row that turn the stream least; never layer 0, before which no FFN stands.

    Raises `OptionError` where so many cannot go.
    """
    starts = range(1, len(distances) - length)
    if length < 1 or not starts:
        raise OptionError(
            f"a run of {length} layers cannot go: the model has {len(distances) - 1}, and the first stays"
        )
    return min(starts, key=lambda first: float(distances[first, first + length]))


@dataclass(frozen=True, slots=True)
class LinearMap:
    """ReplaceMe's: layers `first` to `last` go, and what the FFN of the layer before adds is multiplied by `matrix`."""

    first: int
    last: int
    matrix: Tensor

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.last + 1))


def fit_linear_map(
    traced: TracedModel, batches: Sequence[Batch], first: int, length: int, progress: bool = False
) -> LinearMap:
    """The least-squares map in place of so many layers from `first` on. Raises `OptionError`, see `EditedModel`."""
    gram: Any = 0.0
    cross: Any = 0.0
    kind = torch.float32
    with measuring(traced.model):
        for batch in each(read_batches(batches), progress, "linear map"):
            graph = traced.graph(batch.inputs)
            block, end = ffn_of(graph, first - 1), graph.parts_of((), [first + length - 1])[0].after
            branch = _branch(block)
            run = graph.run(batch.inputs, [branch, block.before, end])
            adds, before, wanted = (pick(run[node], batch.seen).double() for node in (branch, block.before, end))
            gram, cross = gram + adds.T @ adds, cross + adds.T @ (wanted - before)
            kind = run[branch].dtype
    gram = gram + _JITTER * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return LinearMap(first, first + length - 1, torch.linalg.solve(gram, cross).to(kind))
