"""The end of an FFN with a norm on its output: what cannot be folded into the last linear layer.

Matches (no edit):
    b = N(h Wd^T + bd)                N: token-wise, over all channels of a token, whatever its spelling
    b = scale * N(s * (h Wd^T + bd))  scales and shifts before and after it belong to it
Builds (searches nothing):
    y1 = x + N1(W1 h[..., :width_1]);  y2 = y1 + N2(W2 h[..., width_1:])       h: [..., sum of widths]

Exact: the norm of a sum is not the sum of norms, so each member of a group keeps its own, and its own down projection:
the same sum in the same order (with norm="last" too). Views that only regroup tokens are looked through, and made
anew, from the stream's shape or as `[tokens, hidden]`.
Source: norms behind the FFN, as in arXiv 2408.00118, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts, Slice
from fxfusion.graph.isomorphism import Entry, Structure, describe_region
from fxfusion.graph.token_wise import check_token_wise
from fxfusion.passes.build_wide import WideBuilder, clone_region, out_in, regrouped
from fxfusion.passes.choose_form import is_float32_in_cache
from fxfusion.passes.ffn import End, Form, Group, Linear
from fxfusion.passes.match_pieces import RESHAPES, check_axes, regroups_tokens

_NORM_BETWEEN = "a norm stands between the last linear layer and the addition"
_NORM_SIGNS = frozenset("layer_norm rms_norm native_layer_norm group_norm mean var rsqrt normalize norm".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedEnd(End):
    """`nodes`: from the result of `down` to the branch, in graph order; `constants`: what they read beside it.

    `otherwise`: what to say where there turns out to be no norm.
    """

    no_module: ClassVar[str] = "a norm stands on the FFN's output, and the norm of a sum is not the sum of norms"
    nodes: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    otherwise: Refused

    def structure(self, down: fx.Node) -> Structure:
        """How tokens are grouped may differ."""
        computed = [node for node in self.nodes if not regroups_tokens(node)]
        places = {down: "d"} | {node: f"o{index}" for index, node in enumerate(self.constants)}
        numbers = {node: f"%{index}" for index, node in enumerate(computed)}
        for node in self.nodes:
            if regroups_tokens(node):
                shown = node.all_input_nodes[0]
                places[node] = places.get(shown) or numbers[shown]
        return (Entry("a norm on the output", "", "", ""), *describe_region(computed, places))

    def check(self, down: fx.Node) -> None:
        """Something must be computed over all channels of a token, and nothing over tokens."""
        try:
            is_norm = check_token_wise(self.nodes, {down: True} | dict.fromkeys(self.constants, False))
        except Refused as refused:
            cuts_channels = isinstance(refused.node, fx.Node) and ops.op_name(refused.node) in RESHAPES
            if refused.code is RefusalCode.TOKEN_MIXING and not cuts_channels:
                raise
            is_norm = False
            if _looks_like_norm(self.nodes):
                words = f"{_NORM_BETWEEN}, and {refused.message}"
                raise Refused(RefusalCode.OUTPUT_NORM, words, refused.node) from None
        if not is_norm:
            raise self.otherwise

    def check_axes(self, down: fx.Node, stream: fx.Node) -> None:
        check_axes((down, *filter(regroups_tokens, self.nodes)), stream, RefusalCode.OUTPUT_NORM)

    def branches(self, wide: WideBuilder) -> Iterator[tuple[fx.Node, fx.Node]]:
        for member, middle in zip(wide.group.members, wide.group.middle.apart(wide), strict=True):
            weight = out_in(wide.editor, member.down)
            weight = wide.joined([weight]) if self.packs_down(wide.group) else weight
            down = wide.linear(middle, weight, member.down.bias)
            values = {member.down.node: regrouped(wide.editor, down, member.down.node, wide.stream)}
            clone_region(wide.editor, cast(NormedEnd, member.end).nodes, values, wide.stream)
            yield values[member.branch], member.branch

    def packs_down(self, group: Group) -> bool:
        """In oneDNN's layout only; otherwise they are read in place.

        Not in float32 from cache: 8 of them, 256 x 704, took 0.28 ms for one token instead of 0.13 (32 tokens: 1.03
        instead of 1.13). In bfloat16 and from memory they took 0.6 to 0.95 of the time.
        """
        return group.form == "prepacked" and not is_float32_in_cache(group)

    def form_name(self, form: Form) -> str:
        return {"concatenated": "grouped", "prepacked": "grouped_prepacked"}.get(form, form)


def match_normed(
    branch: fx.Node, linears: Sequence[Linear], found: Slice, facts: GraphFacts, before: Refused
) -> tuple[Linear, End] | Refused:
    """The branch's last linear layer and what stands behind it, which `check` asks for a norm."""
    last = linears[-1]
    nodes = _from(last.node, branch, facts)
    if nodes:
        return last, NormedEnd(nodes=nodes, constants=facts.constants_of(nodes), otherwise=before)
    after = [node for node in found.nodes if facts.order[node] > facts.order[last.node]]
    if _looks_like_norm(after):
        return Refused(RefusalCode.OUTPUT_NORM, f"{_NORM_BETWEEN}, and not of its result alone", before.node)
    return before


def _from(down: fx.Node, branch: fx.Node, facts: GraphFacts) -> tuple[fx.Node, ...]:
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


def _looks_like_norm(nodes: Sequence[fx.Node]) -> bool:
    return any(ops.op_name(node) in _NORM_SIGNS for node in nodes)
