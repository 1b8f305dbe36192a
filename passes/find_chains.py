"""Group FFN nodes into chains: maximal runs in which each reads what the one before wrote.

Matches (no edit):
    y1 = x + F1(x);  y2 = y1 + F2(y1);  y3 = y2 + F3(y2)         one chain of three
A chain breaks where a mixer, another reader of the stream, a norm on the stream or a change of
autocast or grad mode stands between two FFNs. An FFN that stays alone gets a refusal that says which.
Source: arXiv 2503.18908, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch import fx

from fxfusion.errors import Refusal, RefusalCode
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.passes.ffn import Chain, FfnNode, Matches, Mixer, refusal_of
from fxfusion.passes.match_pieces import behind_views

Break = tuple[RefusalCode, str]
_FAR = 24  # nodes; what stands between two FFNs and is longer is not looked at


def find_chains(matches: Matches, facts: GraphFacts) -> tuple[tuple[Chain, ...], tuple[Refusal, ...]]:
    """Chains of two or more FFNs, in graph order, and a refusal for each FFN that stands alone."""
    by_add = {ffn.add: ffn for ffn in matches.ffns}
    links: nx.DiGraph[fx.Node] = nx.DiGraph()
    links.add_nodes_from(ffn.add for ffn in matches.ffns)
    for ffn in matches.ffns:
        before = by_add.get(ffn.stream)
        if before is not None and _break_between(before, ffn, facts) is None:
            links.add_edge(before.add, ffn.add)
    chains, refusals = [], []
    for component in nx.weakly_connected_components(links):
        members = tuple(by_add[add] for add in sorted(component, key=facts.order.__getitem__))
        code, ended_by = _end_of(members[-1], matches, facts)
        if len(members) > 1:
            chains.append(
                Chain(members=members, leading=leading_mixer(members[0], matches) is not None, ended_by=ended_by)
            )
        else:
            words = f"no neighbour to fuse with: {_start_of(members[0], matches)}; {ended_by}"
            refusals.append(refusal_of(members[0], code, words))
    return tuple(chains), tuple(refusals)


def _break_between(before: FfnNode, after: FfnNode, facts: GraphFacts) -> Break | None:
    """What keeps two FFNs, the second of which reads the first's result, from being neighbours."""
    own = {*after.nodes, after.add}
    for reader in before.add.users:
        if reader not in own:
            return RefusalCode.STREAM_READ, f"{reader.name} also reads the stream after {before.name}"
    if facts.mode[before.add] != facts.mode[after.add]:
        return RefusalCode.MODE_CHANGE, f"{facts.mode_change(before.add, after.add)} after {before.name}"
    return None


def _end_of(last: FfnNode, matches: Matches, facts: GraphFacts) -> Break:
    """Why the chain goes no further than its last member."""
    for ffn in matches.ffns:
        if ffn.stream is last.add:
            found = _break_between(last, ffn, facts)
            if found is not None:
                return found
    for mixer in matches.mixers:
        if last.add in mixer.add.all_input_nodes:
            return RefusalCode.ALONE, f"{mixer.op} in {mixer.layer or mixer.add.name} follows"
    for ffn in matches.ffns:
        if ffn.stream is not last.add and _is_function_of(ffn.stream, last.add, facts):
            return RefusalCode.POST_NORM, f"the stream after {last.name} passes {ops.op_name(ffn.stream)} first"
    if any(user.op == "output" for user in last.add.users):
        return RefusalCode.STREAM_READ, "the stream is an output of the graph here"
    return RefusalCode.ALONE, "no other FFN reads the stream after it"


def _is_function_of(value: fx.Node, source: fx.Node, facts: GraphFacts) -> bool:
    """Whether `value` was computed from `source` alone, other than by a residual addition."""
    if facts.order[value] < facts.order[source] or ops.op_name(value) == "add" and source in value.all_input_nodes:
        return False
    found = facts.slice_between(value, source, most=_FAR)
    return found.reaches_stop and not found.leaks and len(found.nodes) < _FAR


def _start_of(ffn: FfnNode, matches: Matches) -> str:
    source = behind_views(ffn.stream)
    for mixer in matches.mixers:
        if mixer.add is source:
            return f"{mixer.op} in {mixer.layer or mixer.add.name} comes before"
    return "no FFN comes directly before"


def leading_mixer(first: FfnNode, matches: Matches) -> Mixer | None:
    """The mixer that wrote the stream just before, if it lives in the first member's own layer."""
    source = behind_views(first.stream)
    for mixer in matches.mixers:
        if mixer.add is source:
            if not first.layer and not mixer.layer:
                return mixer
            block = _block_of(first.layer, [ffn.layer for ffn in matches.ffns])
            return mixer if block and f"{mixer.layer}.".startswith(f"{block}.") else None
    return None


def _block_of(layer: str, others: Sequence[str]) -> str:
    """The layer path, cut after the last number in which it differs from its siblings.

    `block.0.layer.2` beside `block.1.layer.2` is `block.0`: the 2 counts sub-layers of one block.
    """
    steps = layer.split(".")
    siblings = [other.split(".") for other in others if _words(other) == _words(layer)]
    for end in range(len(steps), 0, -1):
        if steps[end - 1].isdigit() and len({path[end - 1] for path in siblings}) > 1:
            return ".".join(steps[:end])
    return layer


def _words(path: str) -> tuple[str, ...]:
    return tuple("" if step.isdigit() else step for step in path.split("."))
