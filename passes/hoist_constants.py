"""Move what is computed from weights alone to the top of the graph.

Before:
    y1 = x + F1(x);  g = 1.0 + w2.float();  n2 = y1 * g           w2: [hidden]
After:
    g = 1.0 + w2.float();  y1 = x + F1(x);  n2 = y1 * g

Exact: the moved nodes are pure and read no activation, and weights that the graph itself writes do
not count as constant. After it, a member's constants are in reach wherever the fused FFN is built.
Source: issue 2.
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
        facts = GraphFacts(graph, (node for node in graph.nodes if node.name in self.weights))
        first = next((node for node in graph.nodes if node.op != "placeholder" and node not in facts.constants), None)
        if first is None:
            return PassResult(0)
        late = [node for node in facts.constants if node.op != "placeholder" and facts.order[node] > facts.order[first]]
        for node in sorted(late, key=facts.order.__getitem__):
            first.prepend(node)
        return PassResult(len(late))
