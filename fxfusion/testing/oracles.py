"""Oracles that share nothing with the matchers: they search paths in the graph, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxfusion.graph import ops


def straddles(first: fx.Node, last: fx.Node, is_mixer: Callable[[fx.Node], bool]) -> str | None:
    """What is wrong with a group that reads `first` and writes `last`; None if nothing is.

    Between the two may stand no token mixer, and no value that is read from anywhere else. Brute
    force: every node on any path from `first` to `last` is looked at. Shapes do not count as reading.
    """

    def closure(start: fx.Node, step: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
        seen, pending = {start}, [start]
        while pending:
            for node in step(pending.pop()):
                if node not in seen:
                    seen.add(node)
                    pending.append(node)
        return seen

    between = closure(first, lambda node: list(node.users)) & closure(last, lambda node: node.all_input_nodes)
    if first is last or last not in between or first not in between:
        return f"no path leads from {first} to {last}"
    for node in between - {first}:
        if is_mixer(node):
            return f"{node} mixes tokens"
        asks = node is last or ops.is_shape_value(node)
        readers = set() if asks else {user for user in node.users if user not in between}
        if readers:
            return f"{node} is also read by {readers.pop()}"
    return None
