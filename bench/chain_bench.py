"""What the benchmarks of one chain of FFNs share: compiled copies, a cell, the command line, the table, the record."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from rich.progress import track
from torch import nn
from torch._dynamo.utils import counters

from bench.budget import Session
from bench.record import Measurement, Scalar
from bench.tables import ratio_table, table
from bench.timing import measure

DTYPES = (torch.float32, torch.bfloat16)
MEMBERS = 8
# Two copies of the same thing: how much of a difference is noise.
CONTROL = "unfused/unfused_again"

Compiled = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainBench:
    """One benchmark over cells of shape (hidden x ffn), dtype and tokens, all candidates of a cell interleaved.

    `ratios`: a heading for each ratio of two candidates, such as `"unfused/fused"`. `candidates`: of hidden, ffn and
    dtype. `check`: after the first calls, that they are what they are called. `summarise`: what the file says of all.
    `needs`: seconds of one cell.
    """

    name: str
    about: str
    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    ratios: Mapping[str, str]
    candidates: Callable[[int, int, torch.dtype], Mapping[str, Compiled]]
    check: Callable[[], None]
    summarise: Callable[[Sequence[Measurement]], dict[str, Any]]
    prediction: str
    rounds: int
    needs: float = 20.0

    def cell(self, hidden: int, width: int, dtype: torch.dtype, tokens: int, rounds: int, threads: int) -> Measurement:
        """All candidates of one cell, in one interleaved run."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        modules = self.candidates(hidden, width, dtype)
        x = torch.randn(tokens, hidden, dtype=dtype)
        with torch.no_grad():
            for module in modules.values():
                module(x)
            self.check()
            runs = {name: lambda module=module: module(x) for name, module in modules.items()}
            samples = measure(runs, rounds=rounds, threads=threads)
        return Measurement.of(
            self._place(hidden, width, dtype, tokens), samples, [tuple(name.split("/")) for name in self.ratios]
        )

    def main(self) -> None:
        """The command line: measure every cell, record each when it is done, print the table."""
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="one shape, few rounds, nothing recorded")
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--seconds", type=float, default=3600.0, help="no cell is begun that would end after that")
        parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the cells of an earlier run")
        chosen = parser.parse_args()
        torch.set_num_threads(chosen.threads)
        if chosen.quick:
            self.show([self.cell(*place, 5, chosen.threads) for place in track(self._grid(self.shapes[:1]))])
            return
        with Session(self.name, seconds=chosen.seconds, fresh=not chosen.go_on) as session:
            session.predictions = {"all": self.prediction}
            for hidden, width, dtype, tokens in self._grid(self.shapes):
                place = self._place(hidden, width, dtype, tokens)
                run = partial(self.cell, hidden, width, dtype, tokens, chosen.rounds, chosen.threads)
                session.do(place, run, needs=self.needs)
            session.results["summary"] = self.summarise(session.measurements)
        self.show(session.measurements)

    def show(self, cells: Sequence[Measurement]) -> None:
        """Print the table and what all cells say together."""
        print(ratio_table(cells, list(self.ratios.items())))
        print(table(self.summarise(cells).items(), ("all cells", "")))

    def _grid(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, torch.dtype, int]]:
        """Tokens vary slowest: where time is short each shape and dtype has been seen."""
        return [(*shape, dtype, tokens) for tokens in self.tokens for shape in shapes for dtype in DTYPES]

    @staticmethod
    def _place(hidden: int, width: int, dtype: torch.dtype, tokens: int) -> dict[str, Scalar]:
        return {"hidden": hidden, "width": width, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}


def compiled(module: nn.Module, backend: Any) -> Compiled:
    """A compiled copy, so that no two candidates share memory or compiled code."""
    return torch.compile(copy.deepcopy(module), backend=backend, dynamic=False, fullgraph=True)


def frozen(module: nn.Module) -> Compiled:
    """A compiled copy under Inductor's freezing; RuntimeError at the first call where no weight was packed.

    Dynamo asks the global setting whether weights become constants, not the options, which alone do nothing; and
    without options it would take up the code of an unfrozen copy.
    """
    own = copy.deepcopy(module)
    made = torch.compile(own, backend="inductor", dynamic=False, fullgraph=True, options={"freezing": True})
    packs = lambda: sum(count for name, count in counters["inductor"].items() if "weight_pack" in name)  # noqa: E731

    def first(x: torch.Tensor) -> torch.Tensor:
        before = packs()
        with torch._inductor.config.patch(freezing=True):
            found: torch.Tensor = made(x)
        if packs() == before:
            raise RuntimeError("Inductor's freezing has packed no weight, so this is no comparison with it")
        return found

    return _First(first, made)


class _First:
    """One function at the first call, another one from then on."""

    def __init__(self, first: Compiled, later: Compiled) -> None:
        self._next, self._later = first, later

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        call, self._next = self._next, self._later
        return call(x)


def geomean(cells: Sequence[Measurement], ratio: str) -> float:
    """Over all cells."""
    return round(statistics.geometric_mean(one.ratios[ratio].value for one in cells), 4)
