"""From matches to the report's plain data: members, groups, and the block map before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxfusion.passes.choose_form import packed_bytes
from fxfusion.passes.ffn import Chain, FfnNode, Group, Matches
from fxfusion.report import Block, ChainSummary, GroupSummary, MemberSummary


def summarise_member(ffn: FfnNode) -> MemberSummary:
    return MemberSummary(name=ffn.name, layer=ffn.layer, hidden=ffn.hidden, width=ffn.width, source=ffn.source)


def summarise_chain(chain: Chain) -> ChainSummary:
    members = tuple(summarise_member(ffn) for ffn in chain.members)
    return ChainSummary(members=members, leading=chain.leading, ended_by=chain.ended_by)


def summarise_group(group: Group) -> GroupSummary:
    members = tuple(summarise_member(ffn) for ffn in group.members)
    window = group.window
    return GroupSummary(
        members=members,
        norm=group.norm,
        width=group.width,
        packed_bytes=packed_bytes(group),
        form=group.end.form_name(group.form),
        why=group.why,
        mixers="none" if window is None else window.names.mixers,
        moved=() if window is None else tuple(mixer.layer or mixer.add.name for mixer in window.mixers),
    )


def blocks_before(matches: Matches, groups: Sequence[Group], order: Mapping[str, int]) -> tuple[Block, ...]:
    """The residual blocks of the graph: mixers, FFNs, and candidates that are neither. `order`: of nodes, by name."""
    moved = {mixer.add: index for index, group in enumerate(groups) if group.window for mixer in group.window.mixers}
    group_of = {ffn.add: index for index, group in enumerate(groups) for ffn in group.members}
    placed = [
        (ffn.add.name, Block(kind="ffn", name=ffn.name, width=ffn.width, group=group_of.get(ffn.add)))
        for ffn in matches.ffns
    ]
    for mixer in matches.mixers:
        name = mixer.layer or mixer.add.name
        placed.append((mixer.add.name, Block(kind="mixer", name=name, detail=mixer.op, window=moved.get(mixer.add))))
    mixing = {mixer.add.name for mixer in matches.mixers}
    for refusal in (each for each in matches.refusals if each.node not in mixing):
        name = refusal.layer or refusal.node
        placed.append((refusal.node, Block(kind="refused", name=name, detail=refusal.code.value)))
    return tuple(block for _, block in sorted(placed, key=lambda item: order.get(item[0], 0)))


def blocks_after(before: Sequence[Block], groups: Sequence[GroupSummary]) -> tuple[Block, ...]:
    """The same map with each group drawn as one wide block, in the place of its last member."""
    blocks = []
    for block in before:
        if block.group is None:
            blocks.append(block)
            continue
        members = groups[block.group].members
        if block.name == members[-1].name:
            name = f"{members[0].name} .. {members[-1].name}"
            width = groups[block.group].width
            blocks.append(Block(kind="fused", name=name, width=width, group=block.group, members=len(members)))
    return tuple(blocks)
