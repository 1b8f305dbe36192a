"""Move what is computed from weights alone to the top of the graph.

Before:
    y1 = x + F1(x);  g = 1.0 + w2.float();  n2 = y1 * g           w2: [hidden]
After:
    g = 1.0 + w2.float();  y1 = x + F1(x);  n2 = y1 * g

Exact: the moved nodes are pure and read no activation, weights that the graph itself writes do not
count as constant, and none passes a switch of autocast or grad mode. After it, a member's constants
are in reach wherever the fused FFN is built.
Source: what depends on weights alone is the same at each call.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.pass_base import Pass, PassResult


class HoistConstants(Pass):
    name: ClassVar[str] = "hoist_constants"
    exact: ClassVar[bool] = True

    def __init__(self, weights: frozenset[str]) -> None:
        """`weights`: names of the placeholders that hold module state."""
        self.weights = weights

    def run(self, graph: fx.Graph) -> PassResult:
        facts = GraphFacts(graph, self.weights)
        late: list[fx.Node] = []
        first: dict[int, fx.Node] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "output") or facts.effects.of[node].switches:
                continue
            mode = facts.mode[node]
            if node not in facts.constants:
                first.setdefault(mode, node)
            elif mode in first:
                late.append(node)
        for node in late:
            first[facts.mode[node]].prepend(node)
        return PassResult(len(late))
