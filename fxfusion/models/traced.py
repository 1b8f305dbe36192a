"""A causal language model as one graph that can be run in parts: watched, with blocks removed, from the middle on.

    traced = TracedModel(model).graph(batch)
    base = traced.run(batch, keep=[block.after for block in traced.blocks.layers])
    again = traced.run(batch, keep=[traced.logits], removed=[traced.blocks.mixers[3]], base=base)

The second run computes only what the removed block changes: what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfusion.capture import CapturedGraph, capture_model
from fxfusion.errors import CaptureError
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.models.blocks import Blocks, ResidualBlock, find_blocks
from fxfusion.pipeline import normalising_passes

Batch = Tensor | Mapping[str, Any]


class TracedModel:
    """Captures a model once for each shape of its inputs. The weights are the model's own, not copies."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graphs: dict[tuple[Any, ...], TracedGraph] = {}

    def graph(self, batch: Batch) -> TracedGraph:
        """The graph for inputs that look like these.

        Raises `CaptureError` where the model is not one graph from token ids to logits.
        """
        inputs = model_inputs(self.model, batch)
        key = tuple((name, *_look(value)) for name, value in sorted(inputs.items()))
        if key not in self._graphs:
            self._graphs[key] = _trace(self.model, inputs)
        return self._graphs[key]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run kept. `values`: by node; `removed`: the blocks that it left out."""

    values: Mapping[fx.Node, Any]
    removed: frozenset[ResidualBlock]

    def __getitem__(self, node: fx.Node) -> Tensor:
        found: Tensor = self.values[node]
        return found


@dataclass(slots=True, kw_only=True)
class TracedGraph:
    """One captured graph. `logits`: the node of the logits, `[batch, seq, vocabulary]`."""

    captured: CapturedGraph
    places: Mapping[str, fx.Node]
    blocks: Blocks
    logits: fx.Node
    _shared: tuple[fx.Node, ...] = field(init=False)
    _effects: tuple[fx.Node, ...] = field(init=False)
    _can_resume: bool = field(init=False)
    _writers: Mapping[fx.Node, tuple[fx.Node, ...]] = field(init=False)
    _reach: dict[fx.Node, frozenset[fx.Node]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._shared = _shared_values(self.captured.module.graph, self.blocks)
        self._writers = _in_place_writers(self.captured.module.graph)
        self._effects, self._can_resume = _side_effects(self.captured.module.graph, self.blocks)

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        keep: Iterable[fx.Node],
        removed: Iterable[ResidualBlock] = (),
        base: Run | None = None,
    ) -> Run:
        """Compute the nodes `keep` (and what they need) with some blocks left out.

        `base`: an earlier run on the same batch with fewer blocks left out; its values are used where
        the newly removed blocks do not change them.
        """
        gone = frozenset(removed) | (base.removed if base is not None else frozenset())
        base = base if self._can_resume else None
        known = self._unchanged(base, gone)
        wanted = [*dict.fromkeys(keep)]
        shortcuts = {block.after: block.before for block in gone}
        needed = self._needed((*wanted, *(self._effects if base is None else ())), known, shortcuts)
        kept = set(wanted) | (set(self._shared) if base is None else set())
        values = self._execute(needed, known, shortcuts, kept, self.inputs(batch))
        return Run({node: values[node] for node in (*kept,) if node in values}, gone)

    def needed(self, wanted: Iterable[fx.Node], removed: Iterable[ResidualBlock] = ()) -> set[fx.Node]:
        """The nodes that some values depend on, themselves included, with some blocks left out. Computes nothing."""
        return self._needed(wanted, {}, {block.after: block.before for block in removed})

    def _unchanged(self, base: Run | None, gone: frozenset[ResidualBlock]) -> dict[fx.Node, Any]:
        if base is None:
            return {}
        changed: set[fx.Node] = set()
        for block in gone - base.removed:
            changed |= self._downstream(block.after)
        return {node: value for node, value in base.values.items() if node not in changed}

    def _needed(
        self, wanted: Iterable[fx.Node], known: Mapping[fx.Node, Any], shortcuts: Mapping[fx.Node, fx.Node]
    ) -> set[fx.Node]:
        """Nodes to compute: those that the wanted ones depend on, up to what is known."""
        needed: set[fx.Node] = set()
        pending = [*wanted]
        while pending:
            node = pending.pop()
            if node in needed or node in known:
                continue
            needed.add(node)
            pending.extend(_sources(node, shortcuts))
            pending.extend(self._writers.get(node, ()))
        return needed

    def _downstream(self, node: fx.Node) -> frozenset[fx.Node]:
        """The node and everything computed from it."""
        if node not in self._reach:
            seen, pending = {node}, [node]
            while pending:
                current = pending.pop()
                # A value that is written with a changed one changes for all its readers.
                written = ops.written_argument(current) if ops.writes_in_place(current) else None
                for user in (*current.users, *(written.users if written is not None else ())):
                    if user not in seen:
                        seen.add(user)
                        pending.append(user)
            self._reach[node] = frozenset(seen)
        return self._reach[node]

    def inputs(self, batch: Batch) -> dict[fx.Node, Any]:
        """What the graph's placeholders take for this batch, in their order."""
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        graph = self.captured.module.graph
        places = [node for node in graph.nodes if node.op == "placeholder"]
        values = dict(zip(places, self.captured.inputs, strict=True))
        for name, node in self.places.items():
            values[node] = given[name].to(values[node].device) if isinstance(given[name], Tensor) else given[name]
        return values

    def _execute(
        self,
        needed: set[fx.Node],
        known: dict[fx.Node, Any],
        shortcuts: Mapping[fx.Node, fx.Node],
        kept: set[fx.Node],
        inputs: Mapping[fx.Node, Any],
    ) -> dict[fx.Node, Any]:
        """Run the needed nodes in graph order; free each value after its last reader."""
        interpreter = fx.Interpreter(self.captured.module, garbage_collect_values=False)
        order = [node for node in self.captured.module.graph.nodes if node in needed]
        last_reader = {source: node for node in order for source in _sources(node, shortcuts)}
        env = interpreter.env
        env.update(known)
        for node in order:
            if node in shortcuts:
                env[node] = env[shortcuts[node]]
            elif node.op == "placeholder":
                env[node] = inputs[node]
            else:
                env[node] = interpreter.run_node(node)
            for source in _sources(node, shortcuts):
                if last_reader[source] is node and source not in kept and source not in known:
                    del env[source]
        return env


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keyword inputs of a forward pass without a key-value cache. Labels are left out."""
    given: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    given.pop("labels", None)
    if hasattr(getattr(model, "config", None), "use_cache"):
        given["use_cache"] = False
    return given


def _trace(model: nn.Module, inputs: dict[str, Any]) -> TracedGraph:
    with evaluating(model), torch.no_grad():
        if set(inputs) == {"input_ids"}:
            found, notes = capture_model(model, (inputs["input_ids"],), {})
        else:
            found, notes = capture_model(model, (), inputs)
    if len(found) != 1:
        raise CaptureError(f"the model must be captured as one graph to be run in parts; {'; '.join(notes)}")
    captured = found[0].copy()
    run_passes(captured.module, normalising_passes(captured.weights), History())
    return TracedGraph(
        captured=captured,
        places=_places(captured, inputs),
        blocks=find_blocks(captured, tokens=inputs["input_ids"].numel()),
        logits=_logits(captured, inputs["input_ids"]),
    )


def _places(captured: CapturedGraph, inputs: Mapping[str, Any]) -> dict[str, fx.Node]:
    """Which placeholder takes which input: Dynamo passes the very tensors that the model was called with."""
    nodes = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    names = {id(value): name for name, value in inputs.items() if isinstance(value, Tensor)}
    found = {names[id(value)]: node for node, value in zip(nodes, captured.inputs, strict=True) if id(value) in names}
    if "input_ids" not in found:
        raise CaptureError("the captured graph does not read the token ids")
    return found


def _logits(captured: CapturedGraph, ids: Tensor) -> fx.Node:
    output = captured.module.graph.output_node()
    for node in output.all_input_nodes:
        value = ops.tensor_value(node)
        if value is not None and value.is_floating_point() and value.dim() == 3 and value.shape[:2] == ids.shape:
            return node
    raise CaptureError(f"the model returns no logits [batch, seq, vocabulary] for token ids {list(ids.shape)}")


def _shared_values(graph: fx.Graph, blocks: Blocks) -> tuple[fx.Node, ...]:
    """Values from before the first block that later blocks read: masks, rotary angles, module constants."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    first = min(order[block.after] for block in (*blocks.mixers, *blocks.ffns))
    return tuple(
        node
        for node, place in order.items()
        if place < first
        and node.op not in ("placeholder", "get_attr")
        and any(order[user] > first for user in node.users)
    )


def _in_place_writers(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Which nodes write a value in place after it was made, views of it included."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    facts = GraphFacts(graph, ())
    for node in graph.nodes:
        target = ops.written_argument(node) if ops.writes_in_place(node) else None
        if target is not None:
            root = facts.alias_root(target)
            for value in {root, target}:
                found[value] = (*found.get(value, ()), node)
    return found


def _side_effects(graph: fx.Graph, blocks: Blocks) -> tuple[tuple[fx.Node, ...], bool]:
    """Nodes that switch modes or act otherwise than by their result, and whether all stand before the blocks.

    Where they do not, a run cannot start from the middle: it might start inside a mode.
    """
    first = min((block.after for block in (*blocks.mixers, *blocks.ffns)), key=[*graph.nodes].index)
    effects: list[fx.Node] = []
    before = all_before = True
    for node in graph.nodes:
        if (
            node.op not in ("placeholder", "get_attr", "output")
            and not ops.is_pure(node)
            and not ops.writes_in_place(node)
        ):
            effects.append(node)
            all_before = all_before and before
        before = before and node is not first
    return tuple(effects), all_before


def _sources(node: fx.Node, shortcuts: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    return [shortcuts[node]] if node in shortcuts else node.all_input_nodes


def _look(value: Any) -> tuple[Any, ...]:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (value,)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode after: a model may be frozen in parts."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
