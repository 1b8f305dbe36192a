"""Computes packed weights out of a pack's graph with as little memory as that takes.

    W = cat((W1 * g1, W2 * g2, W3 * g3), 0)                       Wi: [width_i, hidden]

As the graph stands all three products are there before they are joined, which is the wide weight once more. Here each
value is computed when it is asked for: `W` is made empty, and each product is written to its place and dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from fxfusion.graph import ops

_JOINS = frozenset({torch.cat, torch.concat, torch.ops.aten.cat.default})


def packed_values(module: fx.GraphModule, sources: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The values of the graph, one after the other, as `module(*sources)` gives them all."""
    nodes = list(module.graph.nodes)
    roots: Sequence[fx.Node] = nodes[-1].args[0]
    values = _Values(dict(zip((node for node in nodes if node.op == "placeholder"), sources, strict=True)), roots)
    for root in roots:
        yield values.take(root)


class _Values:
    """Values by node, computed on demand, and dropped after their last use."""

    def __init__(self, sources: dict[fx.Node, torch.Tensor], roots: Sequence[fx.Node]) -> None:
        self._sources, self._known = sources, dict[fx.Node, Any]()
        self._uses = Counter(roots)
        for node in ops.reached(roots):
            self._uses.update(ops.nodes_of((node.args, node.kwargs)))

    def take(self, node: fx.Node) -> Any:
        """The value, for one of its uses."""
        if node in self._sources:
            return self._sources[node]
        found = self._known.pop(node) if node in self._known else self._compute(node)
        self._uses[node] -= 1
        if self._uses[node]:
            self._known[node] = found
        return found

    def _compute(self, node: fx.Node) -> Any:
        if node.target in _JOINS and (shape := _shape_of_join(node)) is not None:
            return self._join(node, shape)
        return ops.compute(node, self.take)

    def _join(self, node: fx.Node, shape: torch.Size) -> torch.Tensor:
        parts, axis = _arguments(node)
        first = self.take(parts[0])
        found: torch.Tensor = first.new_empty(shape)
        start = first.shape[axis]
        found.narrow(axis, 0, start).copy_(first)
        del first
        for part in parts[1:]:
            value = self.take(part)
            found.narrow(axis, start, value.shape[axis]).copy_(value)
            start += value.shape[axis]
            del value  # before the next one is made
        assert start == shape[axis], f"{node.format_node()}: {start} of {shape[axis]} written"
        return found


def own(value: torch.Tensor, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """The packed value in memory of its own: contiguous, and never a view of a weight."""
    addresses = {source.untyped_storage().data_ptr() for source in sources}
    value = value.detach().contiguous()
    return value.clone() if value.untyped_storage().data_ptr() in addresses else value


def _shape_of_join(node: fx.Node) -> torch.Size | None:
    """What is known beforehand; None where dtypes would be promoted, or sizes are no numbers."""
    example = ops.tensor_value(node)
    parts = [ops.tensor_value(part) for part in _arguments(node)[0]]
    if example is None or not all(isinstance(size, int) for size in example.shape):
        return None
    return example.shape if all(part is not None and part.dtype == example.dtype for part in parts) else None


def _arguments(join: fx.Node) -> tuple[Sequence[fx.Node], int]:
    """What is joined, and along which axis."""
    tensors = join.args[0] if join.args else join.kwargs["tensors"]
    axis = join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)
    return cast(Sequence[fx.Node], tensors), cast(int, axis)
