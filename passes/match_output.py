"""A norm on an FFN's output: what stands between the last linear layer and the addition and cannot be folded.

Matches (no edit):
    b = N(h Wd^T + bd)                N: token-wise, over all channels of a token, whatever its spelling
    b = scale * N(s * (h Wd^T + bd))  scales and shifts before and after it belong to it
The norm of a sum is not the sum of norms, so each member of a group keeps its own. Views that only regroup
tokens are looked through: `concatenate` makes them anew, from the stream's shape or as `[tokens, hidden]`.
Source: norms behind the FFN, as in arXiv 2408.00118, section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.isomorphism import Entry, Structure, describe_region
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.match_pieces import VIEWS, keeps_channels

NORM_BETWEEN = "a norm stands between the last linear layer and the addition"
_RESHAPES = VIEWS - {"contiguous", "clone"}
_NORM_SIGNS = frozenset("layer_norm rms_norm native_layer_norm group_norm mean var rsqrt normalize norm".split())


def match_output(branch: fx.Node, down: fx.Node, facts: GraphFacts) -> tuple[fx.Node, ...]:
    """The nodes from the result of the last linear layer to the branch, in graph order.

    Empty where they read anything but that result, constants, and sizes or dtypes that are known before it.
    """

    def is_early(node: fx.Node) -> bool:
        return facts.order[node] < facts.order[down] or node.op == "placeholder"

    def read(node: fx.Node) -> list[fx.Node]:
        if node is down or node in facts.constants or is_early(node):
            return []
        return node.all_input_nodes[:1] if regroups_tokens(node) else node.all_input_nodes

    found = [node for node in ops.reached([branch], read) if node not in facts.constants]
    leaks = any(is_early(node) and not ops.is_shape_value(node) for node in found)
    if leaks or down not in found or ops.shape_of(branch)[-1:] != ops.shape_of(down)[-1:]:
        return ()
    inside = (node for node in found if node is not down and not is_early(node))
    return tuple(sorted(inside, key=facts.order.__getitem__))


def is_norm(nodes: Sequence[fx.Node], down: fx.Node, constants: Sequence[fx.Node]) -> bool:
    """Whether something is computed over all channels of a token. Raises `Refused` where tokens see each other, or
    where it looks like a norm that is not understood."""
    try:
        return check_token_wise(nodes, {down: True} | dict.fromkeys(constants, False))
    except Refused as refused:
        cuts_channels = isinstance(refused.node, fx.Node) and ops.op_name(refused.node) in _RESHAPES
        if refused.code is RefusalCode.TOKEN_MIXING and not cuts_channels:
            raise
        if not looks_like_norm(nodes):
            return False
        raise Refused(RefusalCode.OUTPUT_NORM, f"{NORM_BETWEEN}, and {refused.message}", refused.node) from None


def looks_like_norm(nodes: Iterable[fx.Node]) -> bool:
    return any(ops.op_name(node) in _NORM_SIGNS for node in nodes)


def output_structure(nodes: Sequence[fx.Node], down: fx.Node, constants: Sequence[fx.Node]) -> Structure:
    """What must be alike in members of a group; how tokens are grouped may differ."""
    computed = [node for node in nodes if not regroups_tokens(node)]
    places = {down: "d"} | {node: f"o{index}" for index, node in enumerate(constants)}
    numbers = {node: f"%{index}" for index, node in enumerate(computed)}
    for node in nodes:
        if regroups_tokens(node):
            shown = node.all_input_nodes[0]
            places[node] = places.get(shown) or numbers[shown]
    return (Entry("a norm on the output", "", "", ""), *describe_region(computed, places))


def regroups_tokens(node: fx.Node) -> bool:
    """Whether the node is a view that leaves the channel axis as it is."""
    return ops.op_name(node) in _RESHAPES and keeps_channels(node, node.all_input_nodes[0])


def has_axes_of(node: fx.Node, like: fx.Node) -> bool:
    """Whether two values have the same token axes."""
    return ops.shape_of(node)[:-1] == ops.shape_of(like)[:-1]


def is_flat(node: fx.Node) -> bool:
    """Whether the value is `[tokens, channels]`."""
    value = ops.tensor_value(node)
    return value is not None and value.dim() == 2
