"""A random stack as a torch module, with ground truth and an eager parallel form.

Nothing here looks at graphs: what is right follows from the spec alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fxfusion.testing import spec
from fxfusion.testing.blocks import Ffn, Mixer, Norm
from fxfusion.testing.look_alikes import NotFfn

Groups = Sequence[Sequence[int]]

# Look-alikes that read the stream from before the block in front of them, besides their own input.
_READS_EARLIER = ("second_input", "reads_earlier", "tied_outside")


class Stack(nn.Module):
    """`forward(x)` is `(stream, *taps)`; `x`: `[batch, seq, hidden]`, float64, weights from the seed."""

    def __init__(self, given: spec.StackSpec) -> None:
        super().__init__()
        self.given = given
        self.blocks = nn.ModuleList(self._build(block) for block in given.blocks)
        generator = torch.Generator().manual_seed(given.seed)
        self.to(torch.float64)
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
        first = {group[0]: group for group in groups}
        inside = {index for group in groups for index in group}
        streams, outputs = [x], []
        for index, block in enumerate(self.given.blocks):
            if index in first:
                x = self._parallel(x, first[index], norm)
            elif index not in inside:
                x, extra = self._step(x, index, block, streams)
                outputs += extra
            streams.append(x)
        return (x, *outputs)

    def _parallel(self, x: Tensor, group: Sequence[int], norm: str) -> Tensor:
        members = [self._ffn(index) for index in group]
        total = x
        for member in members:
            total = total + member.with_norm(x, members[-1].norm if norm == "last" else member.norm)
        return total

    def _step(self, x: Tensor, index: int, block: spec.Block, streams: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        module = self.blocks[index]
        if isinstance(block, (spec.Ffn, spec.Again)):
            return x + self._ffn(index)(x), []
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
            if isinstance(block, spec.Tap):
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

    def _fits(self, run: Sequence[int], index: int) -> bool:
        homes = [self.home(other) for other in run]
        return self.home(index) not in homes and self._ffn(index).given.kind == self._ffn(run[0]).given.kind

    def _read_by_others(self) -> set[int]:
        """Blocks whose input stream also goes somewhere else than into the block and its addition."""
        blocks = self.given.blocks
        read = [self._stream_read(index) for index, block in enumerate(blocks) if _reads_more(block)]
        return {self._next(position) for position in read}

    def _stream_read(self, index: int) -> int:
        """Which stream a tap or look-alike reads besides its own input: the one after so many blocks."""
        block = self.given.blocks[index]
        if isinstance(block, spec.Tap):
            return max(index - block.back, 0)
        before = [other for other in range(index) if not isinstance(self.given.blocks[other], spec.Tap)]
        if not before:
            raise ValueError(f"block {index} reads an earlier stream, and there is none")
        return before[-1]

    def _next(self, position: int) -> int:
        """The first block at or after the position that is not a tap: the reader of that stream."""
        while position < len(self.given.blocks) and isinstance(self.given.blocks[position], spec.Tap):
            position += 1
        return position


def _reads_more(block: spec.Block) -> bool:
    return isinstance(block, spec.Tap) or (isinstance(block, spec.NotFfn) and block.kind in _READS_EARLIER)
