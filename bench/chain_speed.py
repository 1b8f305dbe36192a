"""A chain of 8 FFNs: fused against unfused, and against one hand-written wide module.

    python -m bench.chain_speed [--quick]

18 cells: hidden x ffn in {256 x 704, 1024 x 2816, 2048 x 1024}, float32 and bfloat16, 1, 16 and 128
tokens; identical Inductor settings. Goals: geometric mean over unfused at least 1.15x, at least 0.95x
of the hand-written module, no cell whose interval lies below 0.97x (issue 2).
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from bench.record import Measurement, record
from bench.tables import ratio_table, table
from bench.timing import measure
from fxfusion import ffn_fusion, last_reports

SHAPES = ((256, 704), (1024, 2816), (2048, 1024))
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (1, 16, 128)
MEMBERS = 8
# Ratios of samples: what it shows, by its name in the file.
FASTER, OF_HAND_WRITTEN, CONTROL = "unfused/fused", "hand_written/fused", "unfused/unfused_again"
PREDICTION = "small shapes gain most (fewer kernels per byte); 128 tokens about even; wide module equal to fused"


class Ffn(nn.Module):
    """`x + down(silu(gate(norm x)) * up(norm x))`, x: [tokens, hidden]."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def compiled(module: nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A compiled copy, so that no two candidates share memory or compiled code."""
    return torch.compile(copy.deepcopy(module), backend=backend, dynamic=False, fullgraph=True)


def cell(hidden: int, width: int, dtype: torch.dtype, tokens: int, rounds: int, threads: int) -> Measurement:
    """All candidates of one cell, in one interleaved run."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    chain = nn.Sequential(*(Ffn(hidden, width) for _ in range(MEMBERS))).to(dtype)
    wide = Ffn(hidden, MEMBERS * width).to(dtype)
    x = torch.randn(tokens, hidden, dtype=dtype)
    modules = {
        "unfused": compiled(chain, "inductor"),
        "unfused_again": compiled(chain, "inductor"),
        "fused": compiled(chain, ffn_fusion),
        "hand_written": compiled(wide, "inductor"),
    }
    with torch.no_grad():
        for module in modules.values():
            module(x)
        assert len(last_reports()[-1].groups) == 1, "the chain was not fused"
        samples = measure(
            {name: lambda module=module: module(x) for name, module in modules.items()}, rounds=rounds, threads=threads
        )
    place = {"hidden": hidden, "width": width, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    pairs = [tuple(name.split("/")) for name in (FASTER, OF_HAND_WRITTEN, CONTROL)]
    return Measurement.of(place, samples, pairs)


def summarise(cells: list[Measurement]) -> dict[str, Any]:
    """The figures that the issue asks for."""

    def mean(name: str) -> float:
        return round(statistics.geometric_mean(one.ratios[name].value for one in cells), 4)

    return {
        "geomean_over_unfused": mean(FASTER),
        "geomean_of_hand_written": mean(OF_HAND_WRITTEN),
        "geomean_a_a": mean(CONTROL),
        "cells_below_0.97": sum(one.ratios[FASTER].high < 0.97 for one in cells),
        "cells_below_0.95_of_hand_written": sum(one.ratios[OF_HAND_WRITTEN].high < 0.95 for one in cells),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds, nothing recorded")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    rounds = 5 if arguments.quick else arguments.rounds
    grid = [(h, w, dtype, tokens) for h, w in shapes for dtype in DTYPES for tokens in TOKENS]
    cells = [cell(*place, rounds, arguments.threads) for place in track(grid, description="cells")]
    columns = [(FASTER, "speed over unfused"), (OF_HAND_WRITTEN, "speed over hand-written"), (CONTROL, "A/A")]
    print(ratio_table(cells, columns))
    summary = summarise(cells)
    print(table(summary.items(), ("all cells", "")))
    if not arguments.quick:
        path = record("chain_speed", {"summary": summary}, measurements=cells, predictions={"all": PREDICTION})
        print("recorded:", path.name)


if __name__ == "__main__":
    main()
