"""Find the linear layers at both ends of mixers that read one stream, so that they can be joined.

Matches (no edit):
    n = norm(x);  q, k, v = n Wq^T, n Wk^T, n Wv^T      projections: linear layers that read the normed stream
    b = attention(q, k, v, ...) Wo^T + bo               out: the linear layer that ends the branch
    b = scale * (... Wo^T)                              tail, where it is asked for; views of [tokens, hidden] likewise
What lies between is opaque: heads, rotary angles, q/k norms, caches, masks.
Source: arXiv 2503.18908, appendix B (layers in parallel).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.isomorphism import describe_region
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.ffn import Branch, End, Linear, Mixer
from fxfusion.passes.kinds import match_end
from fxfusion.passes.match_linear import match_linear
from fxfusion.passes.match_pieces import behind_views
from fxfusion.passes.match_residual import check_shapes, weight_leaves


def match_mixer(
    mixer: Mixer, stream: fx.Node, facts: GraphFacts, opaque: Mapping[str, str], *, loose: bool = False
) -> Branch:
    """The ends of a mixer that reads `stream`. Raises `Refused`.

    `loose`: for those who do not rewrite the graph. The stream may be regrouped on both sides, and scales stand behind
    the last linear layer.
    """
    name = mixer.layer or mixer.add.name
    branch = next(node for node in mixer.add.all_input_nodes if node in mixer.nodes)
    if mixer.add.kwargs.get("alpha", 1) != 1:
        raise Refused(RefusalCode.STRUCTURE, f"the addition of {name} scales its branch", mixer.add)
    check_shapes(mixer.add, branch, stream)
    projections, down, end = _ends(name, branch, stream, facts)
    if not loose and (end.steps or down.node is not branch):
        raise Refused(RefusalCode.STRUCTURE, f"{name} does not end with a linear layer", branch)
    inputs = {behind_views(linear.input) if loose else linear.input for linear in projections}
    if len(inputs) != 1:
        raise Refused(RefusalCode.STRUCTURE, f"the projections of {name} read {len(inputs)} values", branch)
    normed = inputs.pop()
    if behind_views(normed) is not normed:
        raise Refused(RefusalCode.STRUCTURE, f"the projections of {name} read a regrouped stream", normed)
    if not loose and ops.shape_of(down.input)[:-1] != ops.shape_of(stream)[:-1]:
        raise Refused(RefusalCode.STRUCTURE, f"{name} regroups its tokens before it ends", down.node)
    _check_weights(name, (*projections, down), facts, opaque)
    prologue = facts.slice_between(normed, stream).nodes if normed is not stream else ()
    constants = facts.constants_of(prologue)
    check_token_wise(prologue, {stream: True} | dict.fromkeys(constants, False))
    places = {stream: "x"} | {node: f"c{index}" for index, node in enumerate(constants)}
    return Branch(
        stream=stream,
        nodes=mixer.nodes,
        prologue=prologue,
        prologue_constants=constants,
        prologue_structure=describe_region(prologue, places),
        normed=normed,
        projections=projections,
        down=down,
        end=end,
        add=mixer.add,
        name=name,
    )


def _ends(name: str, branch: fx.Node, stream: fx.Node, facts: GraphFacts) -> tuple[tuple[Linear, ...], Linear, End]:
    """The linear layers that read no other linear layer of the mixer, the one that ends it, and what is behind it."""
    found = facts.slice_between(branch, stream)
    linears = [linear for node in found.nodes if (linear := match_linear(node, facts)) is not None]
    down, end = match_end(branch, linears, found, facts)
    if end.no_module:
        words = f"{name} does not end with a linear layer but with {ops.op_name(branch)}"
        raise Refused(RefusalCode.STRUCTURE, words, branch)
    outputs = {linear.node for linear in linears}
    first = (each for each in linears if not outputs & set(facts.slice_between(each.input, stream).nodes))
    return tuple(each for each in first if each is not down), down, end


def _check_weights(name: str, linears: tuple[Linear, ...], facts: GraphFacts, opaque: Mapping[str, str]) -> None:
    for linear in linears:
        for weight in weight_leaves(linear.weight, facts):
            if weight.name in opaque:
                raise Refused(RefusalCode.TENSOR_SUBCLASS, f"{name}: {opaque[weight.name]}", weight)
