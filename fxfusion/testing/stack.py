"""A random stack as a torch module, with ground truth and an eager parallel form.

Nothing here looks at graphs: what is right follows from the spec alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fxfusion.testing import effects, spec
from fxfusion.testing.blocks import Ffn, Mixer, Norm, NotFfn

Groups = Sequence[Sequence[int]]

# Look-alikes that read the stream from before the block in front of them, besides their own input.
_READS_EARLIER = ("second_input", "reads_earlier", "tied_outside")


class Stack(nn.Module):
    """`forward(x)` is `(stream, *taps)`; `x`: `[batch, seq, hidden]`, float64, weights from the seed."""

    def __init__(self, given: spec.StackSpec) -> None:
        super().__init__()
        self.given = given
        self.blocks = nn.ModuleList(self._build(block) for block in given.blocks)
        if given.has_effects:
            for name, value in effects.memory(given.tokens, given.hidden).items():
                self.register_buffer(name, value)
        generator = torch.Generator().manual_seed(given.seed)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)

    def _build(self, block: spec.Block) -> nn.Module:
        hidden, tokens = self.given.hidden, self.given.tokens
        if isinstance(block, spec.Ffn):
            return Ffn(block, hidden)
        if isinstance(block, spec.Mixer):
            return Mixer(block, hidden, tokens[1])
        if isinstance(block, spec.NotFfn):
            return NotFfn(block, hidden, tokens)
        return Norm("rms", hidden) if isinstance(block, spec.StreamNorm) else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.parallel_forward(x, ())

    def parallel_forward(self, x: Tensor, groups: Groups, norm: Literal["fold", "last"] = "fold") -> tuple[Tensor, ...]:
        """The stack where every member of a group reads the group's input. No groups: the stack as it is."""
        held = self._memory()
        first = {group[0]: group for group in groups}
        inside = {index for group in groups for index in group}
        streams, outputs = [x], []
        for index, block in enumerate(self.given.blocks):
            if self._counts(index):
                held["counter"].add_(1.0)  # where the block stands, wherever its branch is computed
            if index in first:
                x = self._parallel(x, first[index], norm, held)
            elif isinstance(block, spec.Effect):
                x, extra = effects.apply(block.kind, x, held)
                outputs += extra
            elif index not in inside:
                x, extra = self._step(x, index, block, streams, held)
                outputs += extra
            streams.append(x)
        return (x, *outputs)

    def _parallel(self, x: Tensor, group: Sequence[int], norm: str, held: effects.Memory) -> Tensor:
        members = [self._ffn(index) for index in group]
        norms = [members[-1].norm if norm == "last" else member.norm for member in members]
        branches = [member.with_norm(x, used, held) for member, used in zip(members, norms, strict=True)]
        for member, branch in zip(members, branches, strict=True):
            x = _sum(x, branch, member.given.sum)
        return x

    def _memory(self) -> effects.Memory:
        """The buffers that effects write, by name."""
        return {name: getattr(self, name) for name in effects.NAMES} if self.given.has_effects else {}

    def _step(
        self, x: Tensor, index: int, block: spec.Block, streams: list[Tensor], held: effects.Memory
    ) -> tuple[Tensor, list[Tensor]]:
        module = self.blocks[index]
        if isinstance(block, (spec.Ffn, spec.Again)):
            return _sum(x, self._ffn(index)(x, held), self._ffn(index).given.sum), []
        if isinstance(block, spec.Mixer):
            return x + module(x), []
        if isinstance(block, spec.StreamNorm):
            return module(x), []
        if isinstance(block, spec.Tap):
            return x, [streams[self._stream_read(index)]]
        earlier = streams[self._stream_read(index)] if _reads_more(block) else x
        found: tuple[Tensor, list[Tensor]] = module(x, earlier)
        return found

    def _ffn(self, index: int) -> Ffn:
        found = self.blocks[self.home(index)]
        assert isinstance(found, Ffn)
        return found

    def _counts(self, index: int) -> bool:
        return (
            isinstance(self.given.blocks[index], (spec.Ffn, spec.Again)) and self._ffn(index).given.within == "counted"
        )

    def home(self, index: int) -> int:
        """The block that owns the FFN module which block `index` calls."""
        block = self.given.blocks[index]
        return block.block if isinstance(block, spec.Again) else index

    def example(self) -> Tensor:
        """A random input, `[batch, seq, hidden]`."""
        generator = torch.Generator().manual_seed(self.given.seed + 1)
        return torch.randn(*self.given.tokens, self.given.hidden, generator=generator, dtype=torch.float64)

    def chains(self) -> tuple[tuple[int, ...], ...]:
        """Maximal runs of two or more FFN blocks with nothing in between that reads or changes the stream."""
        read = self._read_by_others()
        runs: list[list[int]] = [[]]
        for index, block in enumerate(self.given.blocks):
            if _passes_on(block):
                continue
            if not isinstance(block, (spec.Ffn, spec.Again)):
                runs.append([])
                continue
            if index in read:
                runs.append([])
            runs[-1].append(index)
        return tuple(tuple(run) for run in runs if len(run) > 1)

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The right answer of the policy `"maximal"`: each chain cut, left to right, where blocks do not fit."""
        groups: list[list[int]] = []
        for chain in self.chains():
            runs: list[list[int]] = [[]]
            for index in chain:
                if runs[-1] and not self._fits(runs[-1], index):
                    runs.append([])
                runs[-1].append(index)
            groups += [run for run in runs if len(run) > 1]
        return tuple(tuple(group) for group in groups)

    def names(self, groups: Groups) -> list[list[str]]:
        """Module paths of the members, as a report shows them."""
        return [[f"blocks.{self.home(index)}" for index in group] for group in groups]

    def numbered(self, names: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
        """Groups found, as numbers of blocks. Raises `AssertionError` where one is no part of a chain's run."""
        found: list[tuple[int, ...]] = []
        for group in names:
            runs = (chain[at : at + len(group)] for chain in self.chains() for at in range(len(chain)))
            fitting = [run for run in runs if self.names([run]) == [list(group)] and not set(run) & set(sum(found, ()))]
            assert fitting, f"{list(group)} is no run of FFNs with nothing between them"
            found.append(fitting[0])
            first = fitting[0]
            assert all(self._fits(first[:at], first[at]) for at in range(1, len(first))), f"{group} do not fit"
        return tuple(found)

    def _fits(self, run: Sequence[int], index: int) -> bool:
        homes = [self.home(other) for other in run]
        return self.home(index) not in homes and self._ffn(index).given.kind == self._ffn(run[0]).given.kind

    def _read_by_others(self) -> set[int]:
        """Blocks whose input stream also goes somewhere else than into the block and its addition."""
        blocks = self.given.blocks
        read = [self._stream_read(index) for index, block in enumerate(blocks) if _reads_more(block)]
        return {self._next(position) for position in read}

    def _stream_read(self, index: int) -> int:
        """Which stream a tap or look-alike reads besides its own input: the one after so many blocks.

        Memory that an addition has written since shows the stream behind that addition.
        """
        position = self._stream_meant(index)
        while (reader := self._next(position)) < index and self._writes_stream(reader):
            position = reader + 1
        return position

    def _stream_meant(self, index: int) -> int:
        block = self.given.blocks[index]
        if isinstance(block, spec.Tap):
            return max(index - block.back, 0)
        if isinstance(block, spec.Effect):
            return index
        before = [other for other in range(index) if not _passes_on(self.given.blocks[other])]
        if not before:
            raise ValueError(f"block {index} reads an earlier stream, and there is none")
        return before[-1]

    def _writes_stream(self, index: int) -> bool:
        is_ffn = isinstance(self.given.blocks[index], (spec.Ffn, spec.Again))
        return is_ffn and self._ffn(index).given.sum == "into_stream"

    def _next(self, position: int) -> int:
        """The first block at or after the position that takes the stream and gives another: the reader of it."""
        while position < len(self.given.blocks) and _passes_on(self.given.blocks[position]):
            position += 1
        return position


def _sum(x: Tensor, branch: Tensor, kind: spec.Sum) -> Tensor:
    if kind == "new":
        return x + branch
    return branch.add_(x) if kind == "into_branch" else x.add_(branch)


def _passes_on(block: spec.Block) -> bool:
    """Whether the stream after the block is the very tensor that was before it."""
    return isinstance(block, (spec.Tap, spec.Effect)) and not (isinstance(block, spec.Effect) and block.changes_stream)


def _reads_more(block: spec.Block) -> bool:
    if isinstance(block, spec.Effect):
        return block.kind in effects.READING or block.kind == "view_read_later"
    return isinstance(block, spec.Tap) or (isinstance(block, spec.NotFfn) and block.kind in _READS_EARLIER)
