"""Proof without computing that a model which lost some attention is the intact one without those mixers.

The changed model is captured anew and compared with the intact one's graph, mixers taken out: operation by operation,
weight by weight. Works on the meta device. Says nothing about caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfusion.compiler.capture import CapturedGraph, capture_model
from fxfusion.compiler.pipeline import normalising_passes
from fxfusion.errors import SurgeryError
from fxfusion.graph import ops
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import TracedGraph, evaluating, model_inputs


def check_same_graph(model: nn.Module, intact: TracedGraph, removed: Sequence[ResidualBlock], ids: Tensor) -> None:
    """Raises `SurgeryError` unless the model computes what the intact graph without the removed blocks does.

    `intact`: captured for inputs that look like `ids` `[batch, seq]`.
    """
    inputs = model_inputs(model, ids)
    with evaluating(model), torch.no_grad():
        found, notes = capture_model(model, (), inputs)
    if len(found) != 1:
        raise SurgeryError(f"the changed model is not one graph any more; {'; '.join(notes)}")
    changed = found[0].copy()
    _normalise(changed)
    expected = _without(intact.captured, removed)
    own = {id(value) for value in (*model.parameters(), *model.buffers())}
    numbers: dict[Any, int] = {}
    if _identity(expected, own, numbers) != _identity(changed, own, numbers):
        raise SurgeryError("the model computes something else than its graph without the dropped mixers")


def _without(captured: CapturedGraph, removed: Sequence[ResidualBlock]) -> CapturedGraph:
    copied = captured.copy()
    nodes = {node.name: node for node in copied.module.graph.nodes}
    for block in removed:
        nodes[block.after.name].replace_all_uses_with(nodes[block.before.name])
    erase_dead_code(copied.module.graph)
    _normalise(copied)  # what stood around a mixer may cancel now
    return copied


def _normalise(captured: CapturedGraph) -> None:
    run_passes(captured.module, normalising_passes(captured.weights), History())


def _identity(captured: CapturedGraph, own: Set[int], numbers: dict[Any, int]) -> str:
    """A text for what the graph returns: the same for the same operations on the same weights, in whatever order.

    `own`: ids of the model's parameters and buffers. `numbers` gives each distinct value one number, so that large
    graphs need no deep comparison.
    """
    known: dict[fx.Node, str] = {}
    for node in captured.module.graph.nodes:
        arguments = repr(fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__))
        if node.op == "output":
            return arguments
        operation = ops.op_identity(node) if node.op.startswith("call_") else _source(node, captured.values, own)
        known[node] = f"%{numbers.setdefault((operation, arguments), len(numbers))}"
    raise AssertionError("a graph without output")


def _source(node: fx.Node, values: Mapping[str, Tensor], own: Set[int]) -> str:
    """What a placeholder or attribute holds: one of the model's own tensors, or something that looks like this."""
    held = id(values.get(node.name))
    return f"weight {held}" if held in own else f"value {ops.tensor_value(node)}"
