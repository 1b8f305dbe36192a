"""A causal language model as one graph that can be run in parts: watched, with blocks removed, from the middle on.

    traced = TracedModel(model).graph(batch)
    base = traced.run(batch, keep=[block.before for block in traced.blocks.mixers])
    again = traced.run(batch, keep=[traced.logits], removed=[traced.blocks.mixers[3]], base=base)

The second run computes only what the removed block changes: what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfusion.compiler.capture import CapturedGraph, capture_model
from fxfusion.compiler.pipeline import normalising_passes
from fxfusion.compiler.unwrap import offloaded
from fxfusion.errors import CaptureError, OptionError
from fxfusion.graph import ops
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.effects import GraphEffects
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.models.bare_model import bare_model
from fxfusion.models.blocks import Blocks, ResidualBlock, find_blocks
from fxfusion.models.ffn_surgery.quantised import is_quantised

Batch = Tensor | Mapping[str, Any]


class TracedModel:
    """Captures a model once for each shape of its inputs. The weights are the model's own, not copies.

    `model`: may be a `TracedModel`, whose graphs are then used. `dropped_attention`: decoder layers whose
    mixers are left out of every graph, `removed`: those that are left out whole; the model stays as it is. After
    surgery a model must be traced anew.
    Of what `torch.compile` or PEFT wrapped, the model inside is captured, its adapters included.
    """

    def __init__(
        self, model: nn.Module | TracedModel, dropped_attention: Iterable[int] = (), removed: Iterable[int] = ()
    ) -> None:
        self._source = model if isinstance(model, TracedModel) else None
        self.model: nn.Module = model.model if isinstance(model, TracedModel) else bare_model(model)
        known: tuple[int, ...] = () if self._source is None else self._source.dropped_attention
        self._left_out = set(dropped_attention).difference(known)
        self.dropped_attention: tuple[int, ...] = tuple(sorted(self._left_out.union(known)))
        before: tuple[int, ...] = () if self._source is None else self._source.removed
        self._whole = set(removed).difference(before)
        self.removed: tuple[int, ...] = tuple(sorted(self._whole.union(before)))
        self._graphs: dict[tuple[Any, ...], TracedGraph] = {}

    def graph(self, batch: Batch) -> TracedGraph:
        """The graph for inputs that look like these.

        Raises `CaptureError` where the model is not one graph from token ids to logits, `OptionError`
        where a layer of `dropped_attention` has no mixer, or one of `removed` adds nothing to the stream.
        """
        inputs = model_inputs(self.model, batch)
        key = tuple((name, *_look(value)) for name, value in sorted(inputs.items()))
        if key not in self._graphs:
            graph = _trace(self.model, inputs) if self._source is None else self._source.graph(batch)
            changes = self._left_out or self._whole
            self._graphs[key] = graph.without(self._left_out, self._whole) if changes else graph
        return self._graphs[key]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run kept. `values`: by node; `removed`: the blocks that it left out.

    `shared`: nodes kept because many blocks read them.
    """

    values: Mapping[fx.Node, Any]
    removed: frozenset[ResidualBlock]
    shared: frozenset[fx.Node] = frozenset()

    def __getitem__(self, node: fx.Node) -> Tensor:
        found: Tensor = self.values[node]
        return found

    def keeping(self, nodes: Iterable[fx.Node]) -> Run:
        """The same as a base for other runs, without the values of other nodes of blocks: they can be freed."""
        wanted = self.shared.union(nodes)
        return Run({node: value for node, value in self.values.items() if node in wanted}, self.removed, self.shared)


@dataclass(slots=True)
class Resumption:
    """What running one graph in parts must respect. `first_block`: the first node that a removed block could change.

    `shared`: values from before it that later nodes read (masks, rotary angles). `side_effects`: nodes that
    act otherwise than by their result. `can_resume`: whether all of them stand before the first block;
    where they do not, a run cannot start from the middle: it might start inside a mode.
    """

    graph: fx.Graph
    first_block: fx.Node
    shared: tuple[fx.Node, ...] = field(init=False)
    side_effects: tuple[fx.Node, ...] = field(init=False)
    can_resume: bool = field(init=False)
    _effects: GraphEffects = field(init=False)
    _reach: dict[fx.Node, frozenset[fx.Node]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._effects = GraphEffects(self.graph)
        order = self._effects.order
        first = order[self.first_block]
        self.shared = tuple(
            node
            for node, place in order.items()
            if place < first
            and node.op not in ("placeholder", "get_attr")
            and any(order[user] > first for user in node.users)
        )
        effects = self._effects.of.items()
        self.side_effects = tuple(node for node, found in effects if found.draws or found.switches or found.acts)
        self.can_resume = all(order[node] < first for node in self.side_effects)

    def is_written(self, node: fx.Node) -> bool:
        """Whether the value, or one that it may share memory with, is written in place by the graph."""
        return self._effects.root(node) in self._effects.written

    def writers(self, node: fx.Node) -> Sequence[fx.Node]:
        """The nodes that write the value or one that it may share memory with."""
        return self._effects.writers_of(node)

    def downstream(self, node: fx.Node) -> frozenset[fx.Node]:
        """The node and everything that depends on it."""
        if node not in self._reach:
            seen, pending = {node}, [node]
            while pending:
                current = pending.pop()
                # Once a value is written with a changed one, whatever shares its memory is changed.
                written = (
                    member for value in self._effects.of[current].writes for member in self._effects.members(value)
                )
                for reader in (*current.users, *written):
                    if reader not in seen:
                        seen.add(reader)
                        pending.append(reader)
            self._reach[node] = frozenset(seen)
        return self._reach[node]


@dataclass(slots=True, kw_only=True)
class TracedGraph:
    """One captured graph. `logits`: the node of the logits, `[batch, seq, vocabulary]`. `tokens`: batch * seq."""

    captured: CapturedGraph
    places: Mapping[str, fx.Node]
    blocks: Blocks
    logits: fx.Node
    tokens: int
    _resumption: Resumption = field(init=False)

    def __post_init__(self) -> None:
        graph = self.captured.module.graph
        order = {node: place for place, node in enumerate(graph.nodes)}
        parts = (*self.blocks.mixers, *self.blocks.ffns, *self.blocks.layers)
        self._resumption = Resumption(graph, min((block.after for block in parts), key=order.__getitem__))

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
        the newly removed blocks do not change them. It must have kept the `before` of these blocks, or
        it saves less. Values are bit-equal with and without it.
        """
        gone = frozenset(removed) | (base.removed if base is not None else frozenset())
        wanted = dict.fromkeys(keep)
        self._check_own((*wanted, *(block.after for block in gone)))
        base = base if self._resumption.can_resume else None
        known = self._unchanged(base, gone)
        shortcuts = _shortcuts(gone)
        needed = self._needed((*wanted, *(self._resumption.side_effects if base is None else ())), known, shortcuts)
        shared = (needed if base is None else base.shared & known.keys()) & frozenset(self._resumption.shared)
        values = self._execute(needed, known, shortcuts, {*shared, *wanted}, self.inputs(batch))
        return Run(values, gone, frozenset(shared))

    def without(self, layers: Iterable[int], removed: Iterable[int] = ()) -> TracedGraph:
        """The same model without the mixers of some layers, and without others as a whole: what stood beside them is
        matched anew. Raises `OptionError` where there is none."""
        captured = self.captured.copy()
        graph = captured.module.graph
        copies = {node.name: node for node in graph.nodes}
        for block in self.parts_of(layers, removed):
            copies[block.after.name].replace_all_uses_with(copies[block.before.name])
        place = list(graph.output_node().all_input_nodes).index(copies[self.logits.name])
        erase_dead_code(graph)
        run_passes(captured.module, normalising_passes(captured.weights), History())  # views around a mixer may cancel
        places = {name: copies[node.name] for name, node in self.places.items()}
        return _traced(captured, places, graph.output_node().all_input_nodes[place], self.tokens)

    def parts_of(self, layers: Iterable[int], removed: Iterable[int] = ()) -> list[ResidualBlock]:
        """The mixers of some layers, and others as a whole, from last to first: what one leaves may be what the next
        one reads. Raises `OptionError` where there is none."""
        found: list[ResidualBlock] = []
        for wanted, blocks, what in (
            (set(layers), self.blocks.mixers, "attention to drop in"),
            (set(removed), self.blocks.layers, "residual block to remove in"),
        ):
            chosen = [block for block in blocks if block.layer in wanted]
            missing = sorted(wanted - {block.layer for block in chosen})
            if missing:
                have = sorted({block.layer for block in blocks})
                raise OptionError(f"there is no {what} layers {missing}; it is in layers {have}")
            found += chosen
        order = {node: place for place, node in enumerate(self.captured.module.graph.nodes)}
        return sorted(found, key=lambda block: order[block.after], reverse=True)

    def needed(self, wanted: Iterable[fx.Node], removed: Iterable[ResidualBlock] = ()) -> set[fx.Node]:
        """The nodes that some values depend on, themselves included, with some blocks left out. Computes nothing."""
        return self._needed(wanted, {}, _shortcuts(removed))

    def inputs(self, batch: Batch) -> dict[fx.Node, Any]:
        """What the graph's placeholders take for this batch, in their order."""
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        graph = self.captured.module.graph
        places = [node for node in graph.nodes if node.op == "placeholder"]
        values = dict(zip(places, self.captured.inputs, strict=True))
        for name, node in self.places.items():
            values[node] = given[name].to(values[node].device)
        return values

    def _check_own(self, nodes: Iterable[fx.Node]) -> None:
        graph = self.captured.module.graph
        for node in nodes:
            if node.graph is not graph:
                raise ValueError(f"{node} belongs to another graph: blocks and nodes are those of one shape of inputs")

    def _unchanged(self, base: Run | None, gone: frozenset[ResidualBlock]) -> dict[fx.Node, Any]:
        """Values of the base run that hold for this one; what is written in place must be made anew."""
        if base is None:
            return {}
        self._check_own(base.values)
        changed: set[fx.Node] = set()
        for block in gone - base.removed:
            changed |= self._resumption.downstream(block.after)
        known = {node: value for node, value in base.values.items() if node not in changed}
        return {node: value for node, value in known.items() if not self._resumption.is_written(node)}

    def _needed(
        self, wanted: Iterable[fx.Node], known: Mapping[fx.Node, Any], shortcuts: Mapping[fx.Node, fx.Node]
    ) -> set[fx.Node]:
        """Nodes to compute: those that the wanted ones depend on, up to what is known."""
        needed: set[fx.Node] = set()
        pending = [*wanted]
        while pending:
            node = pending.pop()
            if node not in needed and node not in known:
                needed.add(node)
                pending.extend(_sources(node, shortcuts))
                pending.extend(self._resumption.writers(node))
        return needed

    def _execute(
        self,
        needed: set[fx.Node],
        known: dict[fx.Node, Any],
        shortcuts: Mapping[fx.Node, fx.Node],
        kept: set[fx.Node],
        inputs: Mapping[fx.Node, Any],
    ) -> dict[fx.Node, Any]:
        """Run the needed nodes in graph order; free each value after its last reader. Returns what is kept."""
        interpreter = fx.Interpreter(self.captured.module, garbage_collect_values=False)
        order = [node for node in self.captured.module.graph.nodes if node in needed]
        last_reader = {source: node for node in order for source in _sources(node, shortcuts)}
        env = interpreter.env
        env.update(known)
        results = {node: known[node] for node in kept if node in known}
        # What is written in place later on must be handed over as it was when it was made.
        copied = {node for node in (*shortcuts.values(), *kept) if self._resumption.is_written(node)}
        copies: dict[fx.Node, Any] = {}
        for node in order:
            if node in shortcuts:
                source = shortcuts[node]
                env[node] = copies[source].clone() if source in copies else env[source]
            else:
                env[node] = inputs[node] if node.op == "placeholder" else interpreter.run_node(node)
            if node.op in ("placeholder", "get_attr") and self._resumption.is_written(node):
                env[node] = env[node].clone()  # a buffer that the model updates: runs must not
            if node in copied:
                copies[node] = env[node].clone()
            if node in kept:
                results[node] = copies.get(node, env[node])
            for source in (*_sources(node, shortcuts), node):
                if last_reader.get(source, node) is node and source not in known:
                    env.pop(source, None)
        return results


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keyword inputs of a forward pass without a key-value cache, on the model's device. Labels are left out."""
    given: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    given.pop("labels", None)
    weight = next(model.parameters(), None)
    if weight is not None:
        given = {name: value.to(weight.device) if isinstance(value, Tensor) else value for name, value in given.items()}
    if hasattr(getattr(model, "config", None), "use_cache"):
        given["use_cache"] = False
    return given


def _trace(model: nn.Module, inputs: dict[str, Any]) -> TracedGraph:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise CaptureError(f"the inputs must hold `input_ids` [batch, seq], got {sorted(inputs)}")
    if offloaded(model):
        raise CaptureError(f"the model cannot be run in parts: {offloaded(model)}; load it whole")
    with evaluating(model), torch.no_grad():
        if set(inputs) == {"input_ids"}:
            found, notes = capture_model(model, (ids,), {})
        else:
            found, notes = capture_model(model, (), inputs)
    if len(found) != 1:
        raise CaptureError(f"the model must be captured as one graph to be run in parts; {'; '.join(notes)}")
    values = found[0].values
    opaque = {name: why for name, why in found[0].opaque.items() if not is_quantised(values[name])}
    captured = replace(found[0].copy(), opaque=opaque)  # modules can hold what the backend cannot pack
    run_passes(captured.module, normalising_passes(captured.weights), History())
    return _traced(captured, _input_places(captured, inputs), _logits_node(captured, ids), ids.numel())


def _input_places(captured: CapturedGraph, inputs: Mapping[str, Any]) -> dict[str, fx.Node]:
    """Which placeholder takes which input: Dynamo passes the very tensors that the model was called with.

    Raises `CaptureError` where the token ids are not among them.
    """
    nodes = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    names = {id(value): name for name, value in inputs.items() if isinstance(value, Tensor)}
    found = {names[id(value)]: node for node, value in zip(nodes, captured.inputs, strict=True) if id(value) in names}
    if "input_ids" not in found:
        raise CaptureError("the captured graph does not read the token ids")
    return found


def _logits_node(captured: CapturedGraph, ids: Tensor) -> fx.Node:
    """The output that holds the logits `[batch, seq, vocabulary]`. Raises `CaptureError` where there is none."""
    output = captured.module.graph.output_node()
    for node in output.all_input_nodes:
        value = ops.tensor_value(node)
        if value is not None and value.is_floating_point() and value.dim() == 3 and value.shape[:2] == ids.shape:
            return node
    raise CaptureError(f"the model returns no logits [batch, seq, vocabulary] for token ids {list(ids.shape)}")


def _traced(captured: CapturedGraph, places: Mapping[str, fx.Node], logits: fx.Node, tokens: int) -> TracedGraph:
    blocks = find_blocks(captured, tokens)
    return TracedGraph(captured=captured, places=places, blocks=blocks, logits=logits, tokens=tokens)


def _shortcuts(gone: Iterable[ResidualBlock]) -> dict[fx.Node, fx.Node]:
    """What to read instead of the end of each removed block; a layer's start goes before that of its parts."""
    order = {"layer": 2, "ffn": 1, "mixer": 0}
    return {block.after: block.before for block in sorted(gone, key=lambda block: order[block.kind])}


def _sources(node: fx.Node, shortcuts: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    return [shortcuts[node]] if node in shortcuts else node.all_input_nodes


def _look(value: Any) -> tuple[Any, ...]:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (repr(value),)


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
