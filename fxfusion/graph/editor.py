"""The one place that creates and erases nodes.

Every created node gets an example value (by running it on the example values of its arguments, in
their own fake mode) and the provenance of what it replaces.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.effects import KEPT, is_pure
from fxfusion.graph.provenance import copy_provenance
from fxfusion.graph.torch_private import FakeTensor, fake_mode_of, is_batched, outside_fake_mode


class GraphEditor:
    """Builds nodes before one anchor node, in the name of one pass."""

    def __init__(self, anchor: fx.Node, made_by: str, members: Sequence[str]) -> None:
        self.graph = anchor.graph
        self.anchor = anchor
        self.made_by = made_by
        self.members = tuple(members)
        self._mode = fake_mode_of(anchor.graph)

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A `call_function` node before the anchor."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        return self._finish(node, self.anchor)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A `call_method` node before the anchor."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node("call_method", name, args, kwargs)
        return self._finish(node, self.anchor)

    def clone(self, nodes: Sequence[fx.Node], replace: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Copies of a region, in order, reading `replace[value]` wherever the original reads `value`.

        Returns the mapping from every replaced or copied node to its stand-in.
        """
        stand_in = dict(replace)
        for node in nodes:
            with self.graph.inserting_before(self.anchor):
                copy = self.graph.node_copy(node, lambda found: stand_in.get(found, found))
            copy.meta = dict(node.meta)
            stand_in[node] = self._finish(copy, node)
        return stand_in

    def channels(self, value: fx.Node, start: int, stop: int) -> fx.Node:
        """`value[..., start:stop]`."""
        return self.call(operator.getitem, value, (Ellipsis, slice(start, stop)))

    def _finish(self, node: fx.Node, origin: fx.Node) -> fx.Node:
        copy_provenance(origin, node, self.made_by, self.members)
        set_example_value(node, self._mode)
        return node


def set_example_value(node: fx.Node, mode: Any) -> None:
    """Run the node on its arguments' example values. Leaves the node bare where they have none."""
    sources = node.all_input_nodes
    key = "val" if any("val" in source.meta for source in sources) else "example_value"
    for old in ("val", "example_value"):  # a copy has those of its origin
        node.meta.pop(old, None)
    if any("example_value" not in source.meta and "val" not in source.meta for source in sources):
        return

    def value_of(found: fx.Node) -> Any:
        value = ops.example(found)
        if mode is not None and is_batched(value):
            # Its `vmap` is over: what stands for it has the shape of one example.
            with outside_fake_mode(), mode:
                return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if mode is not None and isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return mode.from_tensor(value, static_shapes=True)
        return value

    values = {source: value_of(source) for source in sources}
    # torch.export ("val") records values without gradients; new values must agree with them.
    recording = torch.is_grad_enabled() and key == "example_value"
    with outside_fake_mode(), mode or contextlib.nullcontext(), torch.set_grad_enabled(recording):
        node.meta[key] = ops.compute(node, values.__getitem__)


def write_out(node: fx.Node, value: object) -> None:
    """Put a literal in the place of the node, wherever it is read, and erase it."""

    def instead(found: fx.Node) -> Any:
        return value if found is node else found

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, instead)
        user.kwargs = fx.node.map_arg(user.kwargs, instead)
    node.graph.erase_node(node)


def erase_dead_code(graph: fx.Graph) -> int:
    """Erase nodes that nobody reads and that have no effect; returns how many.

    Unlike `Graph.eliminate_dead_code`, it keeps every node that is not known to be pure, and what nobody read when the
    graph was captured (see `effects`).
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and KEPT not in node.meta and is_pure(node):
            graph.erase_node(node)
            erased += 1
    return erased
