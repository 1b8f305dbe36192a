"""What running a graph in parts must respect: values written in place, mode switches, values that blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts


@dataclass(slots=True)
class Effects:
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
    _roots: dict[fx.Node, fx.Node] = field(init=False, default_factory=dict)
    _writers: dict[fx.Node, list[fx.Node]] = field(init=False, default_factory=dict)
    _views: dict[fx.Node, list[fx.Node]] = field(init=False, default_factory=dict)
    _reach: dict[fx.Node, frozenset[fx.Node]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        first = order[self.first_block]
        self.shared = tuple(
            node
            for node, place in order.items()
            if place < first
            and node.op not in ("placeholder", "get_attr")
            and any(order[user] > first for user in node.users)
        )
        self.side_effects = tuple(node for node in self.graph.nodes if _acts(node))
        self.can_resume = all(order[node] < first for node in self.side_effects)
        self._note_writes()

    def _note_writes(self) -> None:
        facts = GraphFacts(self.graph, ())
        for node in self.graph.nodes:
            target = ops.written_argument(node) if ops.writes_in_place(node) else None
            if target is not None:
                self._writers.setdefault(facts.alias_root(target), []).append(node)
        for node in self.graph.nodes:
            root = facts.alias_root(node)
            if root in self._writers:
                self._roots[node] = root
                self._views.setdefault(root, []).append(node)

    def is_written(self, node: fx.Node) -> bool:
        """Whether the value, or one that it may share memory with, is written in place by the graph."""
        return node in self._roots

    def writers(self, node: fx.Node) -> Sequence[fx.Node]:
        """The nodes that write the value or one that it may share memory with."""
        return self._writers[self._roots[node]] if node in self._roots else ()

    def downstream(self, node: fx.Node) -> frozenset[fx.Node]:
        """The node and everything that depends on it."""
        if node not in self._reach:
            seen, pending = {node}, [node]
            while pending:
                current = pending.pop()
                # Once a value is written with a changed one, whatever shares its memory is changed.
                is_write = current in self._roots and ops.writes_in_place(current)
                written = self._views[self._roots[current]] if is_write else ()
                for reader in (*current.users, *written):
                    if reader not in seen:
                        seen.add(reader)
                        pending.append(reader)
            self._reach[node] = frozenset(seen)
        return self._reach[node]


def _acts(node: fx.Node) -> bool:
    """Whether the node does something else than compute its result or write an argument."""
    computes = node.op in ("placeholder", "get_attr", "output") or ops.is_pure(node)
    return not computes and not ops.writes_in_place(node)
