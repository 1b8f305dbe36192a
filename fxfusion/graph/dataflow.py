"""Read-only questions about a graph: what depends on what, what is constant, what is written.

`GraphFacts` is computed once per graph in a few linear sweeps; matchers ask it and never walk the
whole graph themselves, so matching stays linear in the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from torch import fx

from fxfusion.graph import ops


@dataclass(frozen=True, slots=True)
class Slice:
    """What a value needs, walking back from it until a given node.

    `nodes`: in graph order, without the stop node. `constants`: maximal constant values that the
    nodes read. `shapes`: sizes and numbers computed before the stop node. `leaks`: other values from
    before the stop node. `reaches_stop`: whether the walk met the stop node at all.
    """

    nodes: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    shapes: tuple[fx.Node, ...]
    leaks: tuple[fx.Node, ...]
    reaches_stop: bool
    stop: fx.Node


class GraphFacts:
    """Everything the matchers ask about one graph. `weights`: placeholders that hold module state."""

    def __init__(self, graph: fx.Graph, weights: Iterable[fx.Node]) -> None:
        self.graph = graph
        self.order: dict[fx.Node, int] = {node: index for index, node in enumerate(graph.nodes)}
        self.weights: Set[fx.Node] = frozenset(weights)
        self.written: Set[fx.Node] = self._written()
        self.constants: Set[fx.Node] = self._constants()
        self.mode: dict[fx.Node, int] = self._modes()

    def _constants(self) -> Set[fx.Node]:
        """Values that depend on weights and literals alone."""
        constant: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.weights or node.op == "get_attr":
                known = node not in self.written
            else:
                sources = node.all_input_nodes
                known = bool(sources) and all(source in constant for source in sources) and ops.is_pure(node)
            if known and self.alias_root(node) not in self.written:
                constant.add(node)
        return constant

    def _written(self) -> Set[fx.Node]:
        """Values that an in-place node writes, traced back through views to where they were made."""
        written: set[fx.Node] = set()
        for node in self.graph.nodes:
            if ops.writes_in_place(node):
                target = ops.written_argument(node)
                if target is not None:
                    written.add(self.alias_root(target))
        return written

    def _modes(self) -> dict[fx.Node, int]:
        """How many switches of autocast, grad or inference mode stand before each node."""
        mode, modes = 0, {}
        for node in self.graph.nodes:
            mode += ops.is_mode_switch(node)
            modes[node] = mode
        return modes

    def alias_root(self, node: fx.Node) -> fx.Node:
        """The value whose memory `node` may share: the end of its run of views and in-place writes."""
        while (ops.op_name(node) in ops.ALIASING_OPS or ops.writes_in_place(node)) and node.all_input_nodes:
            written = ops.written_argument(node) if ops.writes_in_place(node) else None
            node = written or node.all_input_nodes[0]
        return node

    def writes_of(self, root: fx.Node) -> tuple[fx.Node, ...]:
        """The in-place nodes that write the value, views of it included, in graph order."""
        found: set[fx.Node] = set()
        pending, seen = [root], {root}
        while pending:
            for user in pending.pop().users:
                if user in seen or self.alias_root(user) is not root:
                    continue
                seen.add(user)
                pending.append(user)
                if ops.writes_in_place(user):
                    found.add(user)
        return tuple(sorted(found, key=self.order.__getitem__))

    def escapes(self, node: fx.Node) -> bool:
        """Whether the caller of the graph gets the value, or something that may share its memory."""
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                if user.op == "output":
                    return True
                if user not in seen and (ops.op_name(user) in ops.ALIASING_OPS or ops.writes_in_place(user)):
                    seen.add(user)
                    pending.append(user)
        return False

    def slice_between(self, start: fx.Node, stop: fx.Node) -> Slice:
        """Everything `start` needs that was computed after `stop`."""
        floor = self.order[stop]
        inside: set[fx.Node] = set()
        constants: dict[fx.Node, None] = {}
        shapes: dict[fx.Node, None] = {}
        leaks: dict[fx.Node, None] = {}
        reaches = False
        pending = [start]
        while pending:
            node = pending.pop()
            if node is stop:
                reaches = True
            elif node in inside:
                continue
            elif node in self.constants:
                constants[node] = None
            elif self.order[node] < floor or node.op == "placeholder":
                (shapes if ops.is_shape_value(node) else leaks)[node] = None
            else:
                inside.add(node)
                pending.extend(node.all_input_nodes)
        ordered = tuple(sorted(inside, key=self.order.__getitem__))
        return Slice(ordered, tuple(constants), tuple(shapes), tuple(leaks), reaches, stop)

    def readers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Users of a node that read its values, not only its shape."""
        return tuple(user for user in node.users if not (ops.is_shape_value(user) and user.op != "output"))
