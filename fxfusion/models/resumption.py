"""What running a graph in parts must respect: values written in place, mode switches, values that blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxfusion.graph.effects import GraphEffects


@dataclass(slots=True)
class Resumption:
    """Facts of one graph. `first_block`: the first node that a removed block could change.

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
