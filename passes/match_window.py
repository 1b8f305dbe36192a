"""Find the mixers and FFNs of each window that a plan or policy names, and whether the mixers may go first.

Matches (no edit):
    x1 = x + A4(x);  y = x1 + F4(x1);  z = y + A5(y);  z1 = z + F5(z)     window [4, 5]: members F4 F5, mixer A5
The mixers before the first member stay where they are. A mixer between the members may move when it reads the
stream at one place only and nothing else that depends on the FFNs it passes, and nobody else reads the stream inside
the window. Everything else is refused, with the layers.
Source: arXiv 2503.18908, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.passes.check_group import GroupChecker
from fxfusion.passes.ffn import FfnNode, Matches, Mixer, NamedWindows, Window
from fxfusion.passes.match_pieces import behind_views, views_behind
from fxfusion.passes.member_index import MemberIndex
from fxfusion.plan.fusion_plan import PlannedGroup
from fxfusion.plan.policy import NormMode

Block = FfnNode | Mixer

_NEEDED = "a window needs layers that add attention to the stream, and then an FFN that reads the sum"


class WindowMatcher:
    """Looks for windows in one graph. Nothing is found where the members could not be fused afterwards."""

    def __init__(self, matches: Matches, facts: GraphFacts, norm: NormMode) -> None:
        self.facts = facts
        self.norm = norm
        self.index = MemberIndex(matches.ffns, matches.refusals)
        self.checker = GroupChecker(facts, matches.ffns)
        self.blocks: dict[fx.Node, Block] = {ffn.add: ffn for ffn in matches.ffns}
        self.blocks |= {mixer.add: mixer for mixer in matches.mixers}
        self.refused = {refusal.node: refusal for refusal in matches.refusals}

    def match(self, wanted: Sequence[PlannedGroup]) -> NamedWindows:
        """The windows that can be had, and why the others cannot. `wanted`: the groups whose mixers move."""
        windows: list[Window] = []
        refusals: dict[PlannedGroup, Refusal] = {}
        for names in wanted:
            what = f"window {list(names)}"
            if not self.index.holds_any(names):
                words = f"{self.index.absent('window', names)}; {_NEEDED}"
                refusals[names] = Refusal(code=RefusalCode.PLAN_ABSENT, message=words)
                continue
            try:
                windows.append(self._window(names))
            except Refused as error:
                message = f"{what}: {error.message}"
                refusals[names] = Refusal(code=RefusalCode.PLAN_UNMATCHED, message=message)
        return NamedWindows(tuple(windows), refusals)

    def _window(self, names: PlannedGroup) -> Window:
        members = sorted((self.index.one(name) for name in names), key=lambda ffn: self.facts.order[ffn.add])
        blocks = self._blocks_between(members)
        mixers = tuple(block for block in blocks if isinstance(block, Mixer))
        self._check_stream(blocks)
        for mixer in mixers:
            self._check_mixer(mixer, members[0])
        self.checker.check_fit(members, self.norm)
        entry = (members[0].stream, *views_behind(members[0].stream))
        for block in blocks:
            if ops.shape_of(block.stream) not in map(ops.shape_of, entry):
                words = f"the stream before {_where(block)} has another shape than before {_where(members[0])}"
                raise Refused(RefusalCode.BROADCAST, words)
        return Window(names=names, members=tuple(members), mixers=mixers, entry=entry)

    def _blocks_between(self, members: Sequence[FfnNode]) -> list[Block]:
        """From the first member to the last, along the stream; every FFN among them is a member."""
        first, last = members[0], members[-1]
        found: list[Block] = [last]
        while found[-1] is not first:
            block = self.blocks.get(behind_views(found[-1].stream))
            if block is None or self.facts.order[block.add] < self.facts.order[first.add]:
                raise self._no_block(found[-1], first)
            if isinstance(block, FfnNode) and block not in members:
                words = f"the FFN of {block.layer or block.name} lies inside it; a window names every FFN in it"
                raise Refused(RefusalCode.PLAN_UNMATCHED, words)
            found.append(block)
        missing = [ffn.name for ffn in members if ffn not in found]
        if missing:
            raise Refused(RefusalCode.PLAN_UNMATCHED, f"{missing[0]} is not on the stream that leads to {last.name}")
        return found[::-1]

    def _no_block(self, after: Block, first: FfnNode) -> Refused:
        """Why the stream cannot be followed back from a block."""
        place = f"between {_where(first)} and {_where(after)}"
        node = behind_views(after.stream)
        refusal = self.refused.get(node.name)
        if refusal is not None:
            words = f"{refusal.layer or refusal.node} {place} cannot move: {refusal.message}"
            return Refused(refusal.code, words)
        if ops.op_name(node) == "add":
            return Refused(RefusalCode.STRUCTURE, f"something {place} is added to the stream that is no token mixer")
        words = f"{place} the stream passes {ops.op_name(node) or node}; only blocks that add to it can move"
        return Refused(RefusalCode.POST_NORM, words)

    def _check_stream(self, blocks: Sequence[Block]) -> None:
        """Between its members, nobody but the next block may read or write the stream."""
        for block, after in zip(blocks, blocks[1:], strict=False):
            forms = (after.stream, *views_behind(after.stream))
            own = {*after.nodes, after.add, *forms}
            for reader in (reader for form in forms for reader in self.facts.readers(form)):
                if reader not in own:
                    words = f"{reader.name} also reads the stream after {_where(block)}, before {_where(after)}"
                    raise Refused(RefusalCode.STREAM_READ, words)
            if self.facts.is_written(block.add):
                raise Refused(RefusalCode.MUTATION, f"the stream after {_where(block)} is written in place")
            if self.facts.mode[block.add] != self.facts.mode[after.add]:
                words = self.facts.mode_change(block.add, after.add)
                raise Refused(RefusalCode.MODE_CHANGE, f"{words} after {_where(block)}")

    def _check_mixer(self, mixer: Mixer, first: FfnNode) -> None:
        """It may move before the first FFN if nothing it reads, but for the stream, depends on that."""
        for value in mixer.leaks:
            if self._depends(value, first.add):
                words = f"{mixer.op} of {_where(mixer)} also reads {value}, which depends on {_where(first)}"
                raise Refused(RefusalCode.OTHER_ACTIVATION, words)

    def _depends(self, value: fx.Node, source: fx.Node) -> bool:
        return (
            self.facts.order[value] > self.facts.order[source] and self.facts.slice_between(value, source).reaches_stop
        )


def _where(block: Block) -> str:
    return (block.name if isinstance(block, FfnNode) else block.layer) or block.add.name
