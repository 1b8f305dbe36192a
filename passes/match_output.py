"""A norm on an FFN's output: what stands between the last linear layer and the addition and cannot be folded.

Matches (no edit):
    b = N(h Wd^T + bd)                N: token-wise, over all channels of a token, whatever its spelling
    b = scale * N(s * (h Wd^T + bd))  scales and shifts before and after it belong to it
The norm of a sum is not the sum of norms, so each member of a group keeps its own. Views that only regroup
tokens are looked through: `concatenate_grouped` makes them anew, from the stream's shape or as `[tokens, hidden]`.
Source: issue 7; class G of model families with a norm behind the FFN.
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
    floor = facts.order[down]
    inside: set[fx.Node] = set()
    pending, reaches_down = [branch], False
    if not _same_channels(branch, down):
        return ()
    while pending:
        node = pending.pop()
        reaches_down = reaches_down or node is down
        if node is down or node in inside or node in facts.constants:
            continue
        if facts.order[node] < floor or node.op == "placeholder":
            if ops.is_shape_value(node):
                continue
            return ()
        inside.add(node)
        pending.extend(node.all_input_nodes[:1] if regroups_tokens(node) else node.all_input_nodes)
    return tuple(sorted(inside, key=facts.order.__getitem__)) if reaches_down else ()


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
    one, other = ops.tensor_value(node), ops.tensor_value(like)
    assert one is not None and other is not None
    return [str(size) for size in one.shape[:-1]] == [str(size) for size in other.shape[:-1]]


def _same_channels(node: fx.Node, other: fx.Node) -> bool:
    one, two = ops.tensor_value(node), ops.tensor_value(other)
    return one is not None and two is not None and one.shape[-1:] == two.shape[-1:]


def is_flat(node: fx.Node) -> bool:
    """Whether the value is `[tokens, channels]`."""
    value = ops.tensor_value(node)
    return value is not None and value.dim() == 2
