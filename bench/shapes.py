"""What is measured: shapes of real FFNs, chain lengths, tokens, types. Widths of one device where a model is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

import torch

LENGTHS = (2, 4, 8, 15)
TOKENS = (1, 4, 16, 64, 256, 2048)
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Shape:
    """An FFN of `hidden` channels; `widths`: intermediate channels of the members in turn, from the first again."""

    name: str
    hidden: int
    widths: tuple[int, ...]

    def members(self, length: int) -> list[int]:
        return [self.widths[number % len(self.widths)] for number in range(length)]


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid."""

    shape: Shape
    length: int
    tokens: int
    dtype: torch.dtype

    @property
    def place(self) -> dict[str, str | int]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": self.shape.name, "members": self.length, "tokens": self.tokens, "dtype": dtype}

    @property
    def parameters(self) -> int:
        """Of the linear layers, which are read once for each batch of tokens."""
        return 3 * self.shape.hidden * sum(self.shape.members(self.length))


# The run of FFNs in layers 53-70 of Llama-3.3-Nemotron-Super-49B-v1, as published.
_SUPER_RUN = (
    7168,
    5632,
    5632,
    7168,
    5632,
    5632,
    5632,
    7168,
    7168,
    2816,
    2816,
    5632,
    5632,
    2816,
    2816,
    5632,
    2816,
    2816,
)

SHAPES = {
    "70B / 8": Shape("70B / 8", 8192, (28672 // 8,)),
    "Super-49B, run": Shape("Super-49B, run", 8192, _SUPER_RUN),
    "405B / 8": Shape("405B / 8", 16384, (53248 // 8,)),
    "Super-49B, 2816": Shape("Super-49B, 2816", 8192, (2816,)),
    "Super-49B, 7168": Shape("Super-49B, 7168", 8192, (7168,)),
    "8B": Shape("8B", 4096, (14336,)),
    "1B": Shape("1B", 2048, (8192,)),
}
# Never part of a published result: what the test of the scripts runs.
SMALL = {"small": Shape("small", 64, (96,)), "small, unequal": Shape("small, unequal", 64, (96, 64))}


def grid(shapes: dict[str, Shape] = SHAPES) -> Iterator[Cell]:
    """All cells, what matters most first: decoding in chains of 8 in bfloat16, then more tokens, then the others."""
    seen: set[Cell] = set()
    for lengths, tokens, dtypes in (
        ((8,), (1,), (torch.bfloat16,)),
        ((8,), (16, 4), (torch.bfloat16,)),
        ((8,), (64, 256, 2048), (torch.bfloat16,)),
        ((2, 4, 15), (1, 16), (torch.bfloat16,)),
        ((8,), (1, 16, 256), (torch.float32,)),
        (LENGTHS, TOKENS, DTYPES),
    ):
        for dtype, length, count, shape in product(dtypes, lengths, tokens, shapes.values()):
            cell = Cell(shape, length, count, dtype)
            if cell not in seen:
                seen.add(cell)
                yield cell


def first(count: int, shapes: dict[str, Shape] = SHAPES) -> list[Cell]:
    return list(islice(grid(shapes), count))
