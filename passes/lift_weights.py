"""Take the computation of packed weights out of the graph, so that it runs once and not per call.

Before:
    W = cat((W1 * g1, W2 * g2));  h = linear(n, W)          Wi: [width_i, hidden], gi: [hidden]
After:
    h = linear(n, packed_0_0)                               a new input, or an attribute
    pack graph of group 0: (W1, g1, W2, g2) -> (cat((W1 * g1, W2 * g2)),)

Exact: the same nodes on the same weights, elsewhere. The original weights keep their places in the
calling convention.
Source: a parameter concat per call cost 20 % of inference elsewhere (pytorch#93420).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.graph.torch_private import lazy_graph_module
from fxfusion.passes.build_wide import PACK_TAG


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """How one group's packed tensors are computed.

    `module` takes the tensors of the nodes named in `sources` and returns a tuple, one tensor for
    each new node named in `values`.
    """

    index: int
    module: fx.GraphModule
    sources: tuple[str, ...]
    values: tuple[str, ...]


Into = Literal["placeholder", "get_attr"]


class LiftWeights(Pass):
    """`run` leaves what it lifted in `packs`, in group order."""

    name: ClassVar[str] = "lift_weights"
    exact: ClassVar[bool] = True

    def __init__(self, weights: frozenset[str], into: Into | None) -> None:
        """Where packed values go; None leaves their computation in the graph. `"get_attr"` lifts only packs whose
        sources are attributes too, since an input may change per call; the new attributes hold fake tensors until
        someone computes the packs.
        """
        self.weights = weights
        self.into = into
        self.packs: tuple[Pack, ...] = ()

    def run(self, graph: fx.Graph) -> PassResult:
        if self.into is None:
            return PassResult(0)
        facts = GraphFacts(graph, self.weights)
        tagged: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if PACK_TAG in node.meta:
                tagged.setdefault(node.meta[PACK_TAG], []).append(node)
        packs = []
        for index, roots in tagged.items():
            sources, inner = constant_needs(roots, facts)
            if self.into == "get_attr" and any(source.op != "get_attr" for source in sources):
                continue
            module = constant_graph(sources, inner, roots)
            named = ((f"packed_{index}_{place}", root) for place, root in enumerate(roots))
            values = [_replace(graph, root, name, self.into) for name, root in named]
            names = tuple(source.name for source in sources)
            packs.append(Pack(index=index, module=module, sources=names, values=tuple(values)))
        self.packs = tuple(packs)
        return PassResult(len(packs))


def _replace(graph: fx.Graph, root: fx.Node, name: str, into: Into) -> str:
    """Put a new input or attribute in the place of a packed value; returns the new node's name."""
    owner = graph.owning_module
    if into == "get_attr" and owner is not None:
        while hasattr(owner, name):  # a graph may be fused twice, by two plans
            name += "_"
        owner.register_buffer(name, ops.tensor_value(root))
    last = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(last[-1] if last else None):
        value = graph.create_node(into, name, (), {}, name=name)
    value.meta = {key: root.meta[key] for key in ("example_value", "val", "fxfusion") if key in root.meta}
    root.replace_all_uses_with(value)
    del root.meta[PACK_TAG]
    return value.name


def constant_needs(roots: Sequence[fx.Node], facts: GraphFacts) -> tuple[list[fx.Node], list[fx.Node]]:
    """The weights that constant values are computed from, and the nodes in between, both in graph order."""
    ordered = sorted(ops.reached(roots), key=facts.order.__getitem__)
    sources = [node for node in ordered if node.op in ("placeholder", "get_attr")]
    return sources, [node for node in ordered if node.op not in ("placeholder", "get_attr")]


def constant_graph(sources: Sequence[fx.Node], inner: Sequence[fx.Node], roots: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph of its own from the weights to the values, with names that depend on the computation alone (it is a
    cache key)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for place, source in enumerate(sources):
        copies[source] = graph.placeholder(f"source_{place}")
        copies[source].meta = {"example_value": ops.tensor_value(source)}
    for place, node in enumerate(inner):
        args = fx.node.map_arg(node.args, copies.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=f"value_{place}")
        copies[node].meta = {"example_value": ops.tensor_value(node)}
    graph.output(tuple(copies[root] for root in roots))
    return lazy_graph_module(torch.nn.Module(), graph)
