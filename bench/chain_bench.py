"""What the benchmarks of one chain of FFNs share: compiled copies, a cell, the command line, the table, the record."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import nn

from bench.record import Measurement, record
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
        place = {"hidden": hidden, "width": width, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
        return Measurement.of(place, samples, [tuple(name.split("/")) for name in self.ratios])

    def main(self) -> None:
        """The command line: measure every cell, print the table, record it."""
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="one shape, few rounds, nothing recorded")
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        arguments = parser.parse_args()
        torch.set_num_threads(arguments.threads)
        shapes = self.shapes[:1] if arguments.quick else self.shapes
        rounds = 5 if arguments.quick else arguments.rounds
        grid = [(h, w, dtype, tokens) for h, w in shapes for dtype in DTYPES for tokens in self.tokens]
        cells = [self.cell(*place, rounds, arguments.threads) for place in track(grid, description="cells")]
        print(ratio_table(cells, list(self.ratios.items())))
        summary = self.summarise(cells)
        print(table(summary.items(), ("all cells", "")))
        if not arguments.quick:
            said = {"all": self.prediction}
            print("recorded:", record(self.name, {"summary": summary}, measurements=cells, predictions=said).name)


def compiled(module: nn.Module, backend: Any, **options: Any) -> Compiled:
    """A compiled copy, so that no two candidates share memory or compiled code. `options`: of Inductor."""
    own = copy.deepcopy(module)
    return torch.compile(own, backend=backend, dynamic=False, fullgraph=True, options=options or None)


def geomean(cells: Sequence[Measurement], ratio: str) -> float:
    """Over all cells."""
    return round(statistics.geometric_mean(one.ratios[ratio].value for one in cells), 4)
