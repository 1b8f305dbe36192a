"""Walk the residual stream: find every addition whose branch is an FFN, a mixer, or neither, and say why.

Matches (no edit):
    y = x + F(x)      F with linear layers inside, everything in it computed after x
Result: FFN nodes, token mixers, and one refusal for each other candidate. A mixer is whatever branch is not known
to treat each token by itself, with or without a linear layer that can be seen; it is a candidate too, so it is refused
(with `token_mixing` where that can be told) and reported as a mixer.
Source: arXiv 2503.18908, equation 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.graph import debug, ops, provenance
from fxfusion.graph.dataflow import GraphFacts, Slice
from fxfusion.graph.effects import is_higher_order, is_random
from fxfusion.graph.isomorphism import describe_region
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.ffn import FfnNode, Matches, Mixer
from fxfusion.passes.match_ffn import FfnMatcher
from fxfusion.passes.write_out import LAYER

MIXERS = frozenset(
    "scaled_dot_product_attention flex_attention conv1d conv2d conv3d convolution conv_transpose1d cumsum cumprod "
    "logcumsumexp cummax roll flip fft_fft fft_rfft rfft fft sort unfold as_strided transpose permute t mT movedim "
    "swapaxes T H avg_pool1d max_pool1d pad lstm gru rnn multi_head_attention_forward associative_scan scan".split()
)
ROUTERS = frozenset(
    "topk one_hot nonzero bincount histc argsort moe grouped_mm _grouped_mm grouped_mm_fallback".split()
)
SELECTORS = frozenset("index_add scatter scatter_add gather index_select masked_select index_put".split())
"""Operations that select by their second tensor; where that holds places in a table, nothing is routed."""


def match_residual(facts: GraphFacts, opaque_weights: Mapping[str, str]) -> Matches:
    """All FFN nodes, mixers and refusals of a graph, in graph order.

    `opaque_weights`: names of weights that cannot be packed (tensor subclasses, quantised), with the reason.
    """
    matcher, tokens = FfnMatcher(facts), _TokenWise(facts)
    ffns: list[FfnNode] = []
    mixers: list[Mixer] = []
    refusals = [_hidden(node) for node in facts.graph.nodes if is_higher_order(node) or ops.op_name(node) == LAYER]
    refusals += _constant_streams(facts)
    for add in facts.graph.nodes:
        operands = residual_operands(add, facts)
        if operands is None:
            continue
        stream, branch = operands
        found = facts.slice_between(branch, stream)
        has_linear = any(ops.op_name(node) in ops.LINEARS for node in found.nodes)
        if not has_linear and (not found.reaches_stop or tokens.are_apart_in(found)):
            refusals += _filled(add, branch, stream, facts)
            continue
        understood = False
        try:
            _check_stream(stream, found, facts)
            _check_branch(add, branch, found, facts, opaque_weights)
            understood = True
            if not has_linear:
                raise Refused(RefusalCode.TOKEN_MIXING, f"{_mixing_op(found, facts)} lets one token see another", add)
            ffns.append(matcher.match(stream, add, branch, found))
            debug.show(4, f"candidate {add}: FFN {ffns[-1].name}")
        except Refused as refused:
            refusals.append(_refusal(refused, add, found, facts))
            debug.show(4, f"candidate {add}: {refused.code.value}: {refused.message}")
            if refused.code is RefusalCode.TOKEN_MIXING or (understood and not tokens.are_apart_in(found)):
                mixers.append(_mixer(add, found, facts))
    return Matches(ffns=tuple(ffns), mixers=tuple(mixers), refusals=tuple(refusals))


class _TokenWise:
    """Which branches are known to treat each token by itself; asked once for each structure."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self._known: dict[object, bool] = {}

    def are_apart_in(self, found: Slice) -> bool:
        """Whether no token sees another in the branch. What cannot be judged counts as a mixer."""
        if any(mixes_tokens(node, self.facts) for node in found.nodes):
            return False
        places = {found.stop: "x"} | {node: f"c{index}" for index, node in enumerate(found.constants)}
        key = (describe_region(found.nodes, places), str(getattr(ops.tensor_value(found.stop), "shape", "")))
        if key not in self._known:
            inputs = {node: node not in found.constants for node in (found.stop, *found.constants, *found.leaks)}
            try:
                check_token_wise(found.nodes, inputs)
                self._known[key] = True
            except Refused:
                self._known[key] = False
        return self._known[key]


def residual_operands(add: fx.Node, facts: GraphFacts) -> tuple[fx.Node, fx.Node] | None:
    """(earlier, later) operand of an addition of two activations: the stream comes first."""
    if ops.op_name(add) != "add" or len(add.args) != 2:
        return None
    left, right = add.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if {left, right} & facts.constants:
        return None
    values = [ops.tensor_value(node) for node in (left, right, add)]
    if any(value is None or not value.is_floating_point() or value.dim() == 0 for value in values):
        return None
    return (left, right) if facts.order[left] < facts.order[right] else (right, left)


def _check_stream(stream: fx.Node, found: Slice, facts: GraphFacts) -> None:
    """Refuse additions whose branch reads something else than the value it is added to."""
    if found.reaches_stop:
        return
    read = set(found.leaks)
    if read & set(stream.all_input_nodes):
        if ops.op_name(stream) == "add":
            message = "the branch reads the stream from before another addition (a parallel block with a mixer)"
            raise Refused(RefusalCode.OTHER_ACTIVATION, message, stream)
        message = f"the stream is not passed on as it is: {ops.op_name(stream)} stands between the branch and the sum"
        raise Refused(RefusalCode.SCALED_STREAM, message, stream)
    names = ", ".join(str(node) for node in found.leaks[:3]) or "nothing"
    raise Refused(RefusalCode.OTHER_ACTIVATION, f"the branch reads {names}, not the stream it is added to", stream)


def _check_branch(
    add: fx.Node, branch: fx.Node, found: Slice, facts: GraphFacts, opaque_weights: Mapping[str, str]
) -> None:
    """Everything that can be refused without knowing what the branch computes."""
    computed = _computed_from(found)
    for node in sorted(found.nodes, key=lambda node: "attention" not in ops.op_name(node)):
        _check_node(node, computed, facts)
    _check_weights(found, facts)
    if found.leaks:
        names = ", ".join(str(node) for node in found.leaks[:3])
        raise Refused(RefusalCode.OTHER_ACTIVATION, f"the branch also reads {names}", found.leaks[0])
    if add.kwargs.get("alpha", 1) != 1:
        raise Refused(RefusalCode.STRUCTURE, f"the addition scales the branch (alpha={add.kwargs['alpha']})", add)
    check_shapes(add, branch, found.stop)
    _check_devices(add, found, facts)
    _check_readers(add, branch, found, facts)
    _check_effects(add, found, facts)
    if len({facts.mode[node] for node in (*found.nodes, add)}) > 1:
        words = facts.mode_change(min(found.nodes, key=facts.order.__getitem__), add)
        raise Refused(RefusalCode.MODE_CHANGE, f"{words} inside the branch", add)
    for node in found.nodes:
        for source in node.all_input_nodes:
            for weight in weight_leaves(source, facts) if source in facts.constants else ():
                if weight.name in opaque_weights:
                    raise Refused(RefusalCode.TENSOR_SUBCLASS, opaque_weights[weight.name], weight)


def _computed_from(found: Slice) -> set[fx.Node]:
    """The values of a branch that depend on what the stream holds."""
    computed = {found.stop}
    for node in found.nodes:
        if not computed.isdisjoint(node.all_input_nodes) and not ops.is_shape_value(node):
            computed.add(node)
    return computed


def _check_node(node: fx.Node, computed: set[fx.Node], facts: GraphFacts) -> None:
    name = ops.op_name(node)
    if is_random(node):
        raise Refused(RefusalCode.RANDOM, f"{name} draws random numbers (dropout in training mode?)", node)
    if is_higher_order(node):
        raise Refused(RefusalCode.HIGHER_ORDER, f"{node.target} hides part of the branch in a sub-graph", node)
    chosen_by = node.all_input_nodes[1:2] if name in SELECTORS else node.all_input_nodes if name in ROUTERS else []
    if not computed.isdisjoint(chosen_by):
        raise Refused(RefusalCode.ROUTER, f"{name} routes tokens to experts", node)
    if mixes_tokens(node, facts):
        raise Refused(RefusalCode.TOKEN_MIXING, f"{name} lets one token see another", node)


def mixes_tokens(node: fx.Node, facts: GraphFacts) -> bool:
    """Whether the operation lets one token see another."""
    name = ops.op_name(node)
    if name in MIXERS or "attention" in name or "conv" in name:
        return True
    if name not in ("matmul", "mm", "bmm", "einsum", "baddbmm"):
        return False
    tensors = [source for source in node.all_input_nodes if not ops.is_shape_value(source)]
    # Two activations multiplied as matrices, or a constant on the left of one.
    return sum(source not in facts.constants for source in tensors) > 1 or (
        bool(tensors) and tensors[0] in facts.constants
    )


def _filled(add: fx.Node, branch: fx.Node, stream: fx.Node, facts: GraphFacts) -> list[Refusal]:
    """A refusal where a layer's result is written into the branch, so that the branch itself does not show it."""
    for write in facts.effects.writers_of(branch) if facts.is_written(branch) else ():
        found = facts.slice_between(write, stream)
        if facts.order[write] < facts.order[add] and any(ops.op_name(node) in ops.LINEARS for node in found.nodes):
            refused = Refused(RefusalCode.MUTATION, f"{branch} is filled in place, by {write}", write)
            return [_refusal(refused, add, found, facts)]
    return []


def _mixer(add: fx.Node, found: Slice, facts: GraphFacts) -> Mixer:
    """The branch, and what it computes only to write it into a cache that it reads: keys and values."""
    nodes, leaks = set(found.nodes), dict.fromkeys(found.leaks)
    read = {facts.effects.root(node) for node in (*found.nodes, *found.leaks)} if facts.written else set()
    writes = {write for cache in read & facts.written for write in facts.effects.writers_of(cache)}
    within = [write for write in writes if facts.order[found.stop] < facts.order[write] < facts.order[add]]
    if within:
        written = facts.slice_between(within, found.stop)
        nodes.update(written.nodes)
        leaks |= dict.fromkeys(sorted(written.leaks, key=facts.order.__getitem__))
    return Mixer(
        add=add,
        stream=found.stop,
        leaks=tuple(leaks),
        nodes=tuple(sorted(nodes, key=facts.order.__getitem__)),
        op=_mixing_op(found, facts),
        layer=provenance.owning_layer(linear_layers(found, facts), add),
    )


def _mixing_op(found: Slice, facts: GraphFacts) -> str:
    attention = next((name for name in dict.fromkeys(map(ops.op_name, found.nodes)) if "attention" in name), "")
    return attention or next((ops.op_name(node) for node in found.nodes if mixes_tokens(node, facts)), "view")


def check_shapes(add: fx.Node, branch: fx.Node, stream: fx.Node) -> None:
    summed, added, carried = map(ops.shape_of, (add, branch, stream))
    if not summed == added == carried:
        raise Refused(RefusalCode.BROADCAST, f"the addition broadcasts {list(carried)} and {list(added)}", add)
    before, after = (ops.tensor_of(node).dtype for node in (stream, add))
    if before != after:
        message = f"the addition turns a {before} stream into {after}"
        raise Refused(RefusalCode.DIFFERENT_DTYPE, message, add)


def _check_devices(add: fx.Node, found: Slice, facts: GraphFacts) -> None:
    """A branch is computed where its stream is, and its weights are kept there."""
    home = ops.device_of(found.stop)
    weights = {weight for constant in found.constants for weight in weight_leaves(constant, facts)}
    for node in (*sorted(weights, key=facts.order.__getitem__), *found.nodes, add):
        device = ops.device_of(node)
        if device is not None and device != home:
            offloaded = " (offloaded?)" if device.type == "meta" else ""
            words = f"{node} is on {device}{offloaded}, the stream on {home}"
            raise Refused(RefusalCode.DIFFERENT_DEVICE, words, node)


def _check_readers(add: fx.Node, branch: fx.Node, found: Slice, facts: GraphFacts) -> None:
    inside = set(found.nodes)
    for node in found.nodes:
        allowed = inside | {add} if node is branch else inside
        outsiders = [user for user in node.users if user not in allowed]
        if outsiders:
            raise Refused(
                RefusalCode.INNER_VALUE_READ, f"{node} is also read by {outsiders[0]}, outside the branch", node
            )


def _check_weights(found: Slice, facts: GraphFacts) -> None:
    """A weight that the graph itself writes is no constant."""
    for node in (*found.nodes, *found.leaks):
        if (node.op == "get_attr" or node in facts.weights) and facts.is_written(node):
            words = f"the weight {node} is written in place by the graph, by {_writers(node, facts)}"
            raise Refused(RefusalCode.MUTATION, words, node)


def _check_effects(add: fx.Node, found: Slice, facts: GraphFacts) -> None:
    """Nodes may write values that the branch made for itself, and do nothing else beside returning a value."""
    inside = set(found.nodes)
    for node in (*found.nodes, add):
        effect = facts.effects.of[node]
        if effect.unknown:
            raise Refused(RefusalCode.UNKNOWN_OP, f"{effect.unknown}: it may write what it reads", node)
        for target in effect.writes:
            private = inside.issuperset(facts.effects.members(target)) and not facts.effects.late_readers(node, target)
            if not private or node is add:
                raise Refused(RefusalCode.MUTATION, f"{node} writes {target} in place", node)
        if effect.acts:
            raise Refused(RefusalCode.MUTATION, f"{node} is there for its effect", node)
    for node in found.nodes:
        for source in node.all_input_nodes:
            if source not in inside and facts.is_written(source):
                words = f"{source} is written in place elsewhere in the graph, by {_writers(source, facts)}"
                raise Refused(RefusalCode.MUTATION, words, add)


def _writers(node: fx.Node, facts: GraphFacts) -> str:
    return ", ".join(map(str, facts.effects.writers_of(node)[:3]))


def weight_leaves(node: fx.Node, facts: GraphFacts) -> set[fx.Node]:
    """The weights that a constant is computed from."""
    return {source for source in ops.reached([node]) if source in facts.weights or source.op == "get_attr"}


def _refusal(refused: Refused, add: fx.Node, found: Slice, facts: GraphFacts) -> Refusal:
    node = refused.node if isinstance(refused.node, fx.Node) else add
    return Refusal(
        code=refused.code,
        message=refused.message,
        node=str(add),
        layer=provenance.common_path((*linear_layers(found, facts), add)),
        source=provenance.source_line(node) or provenance.source_line(add),
    )


def linear_layers(found: Slice, facts: GraphFacts) -> tuple[fx.Node, ...]:
    """The nodes that say where a branch lives: its linear layers. Masks and rotary angles are made elsewhere, some by
    a product with a constant on the left, which is no linear layer."""
    linears = [node for node in found.nodes if ops.op_name(node) in ops.LINEARS and provenance.has_provenance(node)]
    return tuple(node for node in linears if not mixes_tokens(node, facts))


def _constant_streams(facts: GraphFacts) -> list[Refusal]:
    """Residual branches on a stream that depends on weights alone, such as latents that a module owns."""
    found = []
    for add in facts.graph.nodes:
        if add not in facts.constants or ops.op_name(add) != "add" or len(add.all_input_nodes) != 2:
            continue
        stream, branch = sorted(add.all_input_nodes, key=facts.order.__getitem__)
        inside = _back_to(stream, branch)
        if stream in inside and any(ops.op_name(node) in ops.LINEARS for node in inside):
            found.append(
                Refusal(
                    code=RefusalCode.STRUCTURE,
                    message="its stream depends on no input, on weights alone; only branches on an activation fuse",
                    node=str(add),
                    layer=provenance.common_path((add,)),
                    source=provenance.source_line(add),
                )
            )
    return found


def _back_to(stream: fx.Node, branch: fx.Node) -> Collection[fx.Node]:
    return ops.reached([branch], lambda node: () if node is stream else node.all_input_nodes)


def _hidden(node: fx.Node) -> Refusal:
    whole = "is a whole layer in one operation, with a mask, its norms on the stream or a symbolic width"
    inside = "holds a sub-graph (activation checkpointing?)"
    return Refusal(
        code=RefusalCode.HIGHER_ORDER,
        message=f"{node.target if is_higher_order(node) else LAYER} {inside if is_higher_order(node) else whole}; "
        "FFNs in it are not looked at",
        node=str(node),
        layer=provenance.module_path(node),
        source=provenance.source_line(node),
    )
