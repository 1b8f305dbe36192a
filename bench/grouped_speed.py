"""A chain of 8 FFNs with a norm on their output: fused against unfused, and against the parallel form member by member.

    python -m bench.grouped_speed [--quick]

8 cells: hidden x ffn in {256 x 704, 1024 x 2816}, float32 and bfloat16, 1 and 32 tokens; identical Inductor settings.
Goal: faster than unfused, or the group is better left member by member (issue 7).
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from bench.chain_speed import compiled
from bench.record import Measurement, record
from bench.tables import ratio_table, table
from bench.timing import measure
from fxfusion import ffn_fusion, last_reports

SHAPES = ((256, 704), (1024, 2816))
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (1, 32)
MEMBERS = 8
# Ratios of samples: what it shows, by its name in the file.
FASTER, OF_MEMBERS, CONTROL = "unfused/fused", "members/fused", "unfused/unfused_again"
PREDICTION = "about even with the members in parallel where weights bound the time: only gate and up are joined"


class Ffn(nn.Module):
    """`x + norm(down(silu(gate x) * up x))`, x: [tokens, hidden]."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.down(F.silu(self.gate(x)) * self.up(x)))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Members(nn.Module):
    """The parallel form, each member by itself."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x
        for member in self.chain:
            assert isinstance(member, Ffn)
            total = total + member.branch(x)
        return total


def cell(hidden: int, width: int, dtype: torch.dtype, tokens: int, rounds: int, threads: int) -> Measurement:
    """All candidates of one cell, in one interleaved run."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    chain = nn.Sequential(*(Ffn(hidden, width) for _ in range(MEMBERS))).to(dtype)
    x = torch.randn(tokens, hidden, dtype=dtype)
    modules = {
        "unfused": compiled(chain, "inductor"),
        "unfused_again": compiled(chain, "inductor"),
        "members": compiled(Members(chain), "inductor"),
        "fused": compiled(chain, ffn_fusion),
    }
    with torch.no_grad():
        for module in modules.values():
            module(x)
        assert [group.form for group in last_reports()[-1].groups] == ["grouped"], "the chain was not fused"
        samples = measure(
            {name: lambda module=module: module(x) for name, module in modules.items()}, rounds=rounds, threads=threads
        )
    place = {"hidden": hidden, "width": width, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    return Measurement.of(place, samples, [tuple(name.split("/")) for name in (FASTER, OF_MEMBERS, CONTROL)])


def summarise(cells: list[Measurement]) -> dict[str, Any]:
    """Geometric means over the cells, and where fusing does not pay."""
    means = {
        name: round(statistics.geometric_mean(one.ratios[name].value for one in cells), 4)
        for name in (FASTER, OF_MEMBERS, CONTROL)
    }
    return means | {"cells_slower_than_members": sum(one.ratios[OF_MEMBERS].high < 0.97 for one in cells)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds, nothing recorded")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    rounds = 5 if arguments.quick else arguments.rounds
    grid = [(h, w, dtype, tokens) for h, w in shapes for dtype in DTYPES for tokens in TOKENS]
    cells = [cell(*place, rounds, arguments.threads) for place in track(grid, description="cells")]
    columns = [(FASTER, "speed over unfused"), (OF_MEMBERS, "speed over members"), (CONTROL, "A/A")]
    print(ratio_table(cells, columns))
    summary = summarise(cells)
    print(table(summary.items(), ("all cells", "")))
    if not arguments.quick:
        path = record("grouped_speed", {"summary": summary}, measurements=cells, predictions={"all": PREDICTION})
        print("recorded:", path.name)


if __name__ == "__main__":
    main()
