"""Read-only questions about a graph: what depends on what, what is constant, what is written.

`GraphFacts` is computed once per graph in a few linear sweeps; matchers ask it and never walk the
whole graph themselves, so matching stays linear in the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.effects import graph_effects


@dataclass(frozen=True, slots=True)
class Slice:
    """What a value needs, walking back from it until a given node.

    `nodes`: in graph order, without the stop node. `constants`: maximal constant values that the
    nodes read. `shapes`: sizes and numbers that are known with the stop node. `leaks`: other values from
    before the stop node. `reaches_stop`: whether the walk met the stop node at all.
    """

    nodes: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    shapes: tuple[fx.Node, ...]
    leaks: tuple[fx.Node, ...]
    reaches_stop: bool
    stop: fx.Node


class GraphFacts:
    """Everything the matchers ask about one graph. `weights`: placeholders that hold module state, or their names."""

    def __init__(self, graph: fx.Graph, weights: Iterable[fx.Node | str]) -> None:
        self.graph = graph
        self.effects = graph_effects(graph)
        self.order: Mapping[fx.Node, int] = self.effects.order
        self.mode: Mapping[fx.Node, int] = self.effects.modes
        self.written: Set[fx.Node] = self.effects.written
        given = frozenset(weights)
        self.weights: Set[fx.Node] = frozenset(node for node in graph.nodes if node in given or node.name in given)

    @cached_property
    def constants(self) -> Set[fx.Node]:
        """Values that depend on weights and literals alone."""
        constant: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.weights or node.op == "get_attr":
                known = True
            else:
                sources = node.all_input_nodes
                known = bool(sources) and all(source in constant for source in sources) and self._is_pure(node)
            if known and not self.is_written(node):
                constant.add(node)
        return constant

    def _is_pure(self, node: fx.Node) -> bool:
        return node.op != "output" and self.effects.of[node].is_none

    def is_written(self, node: fx.Node) -> bool:
        """Whether some node writes the value, or one that may share its memory."""
        return self.effects.root(node) in self.written

    def constants_of(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """The constants that a region reads, in the order it reads them."""
        sources = (source for node in nodes for source in node.all_input_nodes)
        return tuple(dict.fromkeys(source for source in sources if source in self.constants))

    def slice_between(self, start: fx.Node | Sequence[fx.Node], stop: fx.Node, most: int | None = None) -> Slice:
        """Everything `start` needs that was computed after `stop`. `most`: look no further once it is so many nodes."""
        floor = self.order[stop]
        inside: set[fx.Node] = set()
        constants: dict[fx.Node, None] = {}
        shapes: dict[fx.Node, None] = {}
        leaks: dict[fx.Node, None] = {}
        reaches = False
        pending = [start] if isinstance(start, fx.Node) else list(start)
        while pending and (most is None or len(inside) < most):
            node = pending.pop()
            if node is stop:
                reaches = True
            elif node in inside:
                continue
            elif node in self.constants:
                constants[node] = None
            elif ops.is_shape_value(node) and self._is_known_with(node, stop):
                shapes[node] = None
            elif self.order[node] < floor or node.op == "placeholder":
                leaks[node] = None
            else:
                inside.add(node)
                pending.extend(node.all_input_nodes)
        ordered = tuple(sorted(inside, key=self.order.__getitem__))
        return Slice(ordered, tuple(constants), tuple(shapes), tuple(leaks), reaches, stop)

    def _is_known_with(self, node: fx.Node, stop: fx.Node) -> bool:
        """Whether the node is a size or a number that asks for no value computed after `stop`."""
        if not ops.is_shape_value(node):
            return node is stop or self.order[node] < self.order[stop]
        early = node.op == "placeholder" or self.order[node] < self.order[stop]
        return early or all(self._is_known_with(source, stop) for source in node.all_input_nodes)

    def mode_change(self, one: fx.Node, other: fx.Node) -> str:
        """What changes a mode between two nodes, or may, in words."""
        first, last = sorted((self.order[one], self.order[other]))
        switches = (node for node, effect in self.effects.of.items() if effect.switches)
        switch = next(node for node in switches if first < self.order[node] <= last)
        return f"{switch} changes autocast, grad mode or a level of functorch, or may,"

    def readers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Users of a node that read its values, not only its shape."""
        return tuple(user for user in node.users if not (ops.is_shape_value(user) and user.op != "output"))
