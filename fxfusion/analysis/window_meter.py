"""What a change of some layers costs, at a part of the price of a whole measurement: for a screen of many windows.

    x_0 ... x_a     streams of the intact model, kept from one run of it
            └─ layers a to b as a plan has them ─ y ─ later layers ─ logits
    distance        |y - x_b+1| / |x_b+1|, token by token: only the layers of the window are computed
    increase        the loss of the logits less the intact model's, in nats per token: only what comes after x_a

The distance says which windows are hopeless; what it is worth was measured once (docs/real_model.md). Losses are those
that the whole graph gives, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxfusion.analysis.batches import Batch, TokenBatch, measuring, read_batches
from fxfusion.analysis.measures import token_measures
from fxfusion.analysis.planned import PlannedModel
from fxfusion.graph.effects import GraphEffects
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.plan.fusion_plan import FusionPlan

_KEPT_BYTES = 2**30  # streams of the intact model that are kept; where they are more, whole graphs are run


@dataclass(frozen=True, slots=True)
class _Intact:
    """One batch. `streams`: before each layer and after the last one, by node; empty where they are not kept."""

    batch: TokenBatch
    graph: TracedGraph
    streams: Mapping[fx.Node, Tensor]
    loss: float
    tokens: int


class WindowMeter:
    """`batches`: a text of few tokens, of one shape at best; `increase` may take the first of them alone."""

    def __init__(self, traced: TracedModel, batches: Iterable[Batch]) -> None:
        self.traced, self.batches = traced, read_batches(batches)
        self._known: list[_Intact] | None = None
        self._planned: PlannedModel | None = None

    @torch.no_grad()
    def distance(self, plan: FusionPlan, first: int, last: int) -> float | None:
        """How far the stream after layer `last` is from the intact model's, as a part of its size: root of the mean
        square over tokens. None where that stream cannot be told in the changed graph. `first`: the first layer that
        the plan changes. Raises `NotFusedError` where the plan cannot be had."""
        errors = []
        for own in self._intact():
            module, packed = self._program(plan, own)
            wanted = _layers(own.graph)[last].after
            node = _successor(wanted, module.graph)
            if node is None or wanted not in own.streams:
                return None
            target, found = own.streams[wanted].float(), self._run(own, module, packed, first, node).float()
            error = (found - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)
            errors.append(error.flatten()[own.batch.seen.flatten().to(error.device)])
        return float(torch.cat(errors).mean().sqrt())

    @torch.no_grad()
    def increase(self, plan: FusionPlan, first: int, batches: int | None = None) -> float:
        """By how much the plan raises the loss on the first batches, in nats per token. See `distance`."""
        loss = before = tokens = 0.0
        for own in self._intact()[:batches]:
            module, packed = self._program(plan, own)
            (node,) = module.graph.output_node().all_input_nodes
            loss += _loss(self._run(own, module, packed, first, node), own.batch)
            before, tokens = before + own.loss, tokens + own.tokens
        return (loss - before) / max(tokens, 1.0)

    def _program(self, plan: FusionPlan, own: _Intact) -> tuple[fx.GraphModule, Sequence[Tensor]]:
        if self._planned is None or self._planned.plan != plan:
            self._planned = PlannedModel(self.traced, plan)
        return self._planned.program(own.graph)

    def _intact(self) -> list[_Intact]:
        if self._known is None:
            with measuring(self.traced.model):
                self._known = [self._run_intact(batch) for batch in self.batches]
        return self._known

    def _run_intact(self, batch: TokenBatch) -> _Intact:
        graph = self.traced.graph(batch.inputs)
        layers = _layers(graph).values()
        keep = [*(layer.before for layer in layers), *(layer.after for layer in layers)]
        run = graph.run(batch.inputs, keep=[graph.logits, *keep])
        streams = {node: run[node] for node in keep}
        size = sum(value.numel() * value.element_size() for value in streams.values())
        kept = streams if size * len(self.batches) <= _KEPT_BYTES and not _acts(graph) else {}
        return _Intact(batch, graph, kept, _loss(run[graph.logits], batch), int(batch.counted.sum()))

    def _run(
        self, own: _Intact, module: fx.GraphModule, packed: Sequence[Tensor], first: int, wanted: fx.Node
    ) -> Tensor:
        """One value of a changed graph, from the intact stream before layer `first` on, where that is known."""
        start = _layers(own.graph)[first].before
        same = {node.name: node for node in module.graph.nodes}.get(start.name)
        known = {} if same is None or start not in own.streams else {same: own.streams[start]}
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        given = dict(zip(places, (*own.graph.inputs(own.batch.inputs).values(), *packed), strict=True))
        # Where nothing is known the graph may do more than compute: then all of it is run.
        everything = [node for node in module.graph.nodes if node.op != "output"]
        order = _needed(module.graph, wanted, known) if known else everything
        last_reader = {source: node for node in order for source in node.all_input_nodes}
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        env = interpreter.env
        env.update(known)
        for node in order:
            env[node] = given[node] if node.op == "placeholder" else interpreter.run_node(node)
            for source in node.all_input_nodes:
                if last_reader[source] is node and source is not wanted:
                    env.pop(source, None)
        value: Tensor = env[wanted]
        return value


def _layers(graph: TracedGraph) -> dict[int, Any]:
    return {block.layer: block for block in graph.blocks.layers}


def _acts(graph: TracedGraph) -> bool:
    """Whether it does anything but compute its result: then no part of it is run alone."""
    effects = GraphEffects(graph.captured.module.graph)
    return bool(effects.written) or any(one.draws or one.switches or one.acts for one in effects.of.values())


def _needed(graph: fx.Graph, wanted: fx.Node, known: Iterable[fx.Node]) -> list[fx.Node]:
    """What a value is computed from, up to what is known, in graph order."""
    seen, pending = set(known), [wanted]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in seen.difference(known)]


def _successor(node: fx.Node, changed: fx.Graph) -> fx.Node | None:
    """What stands in a changed copy of a graph where `node` stood: what its readers, which kept their names, read."""
    names = {other.name: other for other in changed.nodes}
    for reader in node.users:
        other = names.get(reader.name)
        if other is not None and other.target == reader.target and len(other.args) == len(reader.args):
            places = [place for place, value in enumerate(reader.args) if value is node]
            found = other.args[places[0]] if places else None
            if isinstance(found, fx.Node):
                return found
    return None


def _loss(logits: Tensor, batch: TokenBatch) -> float:
    """Summed over the tokens that count [nats]."""
    if not bool(batch.counted.any()):
        return 0.0
    return float(token_measures(logits[:, :-1], batch.targets, batch.counted).double().sum())
