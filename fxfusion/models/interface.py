"""Where a captured graph takes the model's inputs, and where it gives the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxfusion.compiler.capture import CapturedGraph
from fxfusion.errors import CaptureError
from fxfusion.graph import ops


def input_places(captured: CapturedGraph, inputs: Mapping[str, Any]) -> dict[str, fx.Node]:
    """Which placeholder takes which input: Dynamo passes the very tensors that the model was called with.

    Raises `CaptureError` where the token ids are not among them.
    """
    nodes = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    names = {id(value): name for name, value in inputs.items() if isinstance(value, Tensor)}
    found = {names[id(value)]: node for node, value in zip(nodes, captured.inputs, strict=True) if id(value) in names}
    if "input_ids" not in found:
        raise CaptureError("the captured graph does not read the token ids")
    return found


def logits_node(captured: CapturedGraph, ids: Tensor) -> fx.Node:
    """The output that holds the logits `[batch, seq, vocabulary]`. Raises `CaptureError` where there is none."""
    output = captured.module.graph.output_node()
    for node in output.all_input_nodes:
        value = ops.tensor_value(node)
        if value is not None and value.is_floating_point() and value.dim() == 3 and value.shape[:2] == ids.shape:
            return node
    raise CaptureError(f"the model returns no logits [batch, seq, vocabulary] for token ids {list(ids.shape)}")
