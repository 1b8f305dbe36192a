"""A chain of 8 FFNs with a norm on their output: fused against unfused, and against the parallel form member by member.

    python -m bench.grouped_speed [--quick]

8 cells: hidden x ffn in {256 x 704, 1024 x 2816}, float32 and bfloat16, 1 and 32 tokens; identical Inductor settings.
Goal: faster than unfused, or the group is better left member by member (issue 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.chain_bench import CONTROL, MEMBERS, ChainBench, Compiled, compiled, geomean
from bench.record import Measurement
from fxfusion import ffn_fusion, last_reports

# Ratios of samples: what it shows, by its name in the file.
FASTER, OF_MEMBERS = "unfused/fused", "members/fused"


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


def candidates(hidden: int, width: int, dtype: torch.dtype) -> Mapping[str, Compiled]:
    chain = nn.Sequential(*(Ffn(hidden, width) for _ in range(MEMBERS))).to(dtype)
    return {
        "unfused": compiled(chain, "inductor"),
        "unfused_again": compiled(chain, "inductor"),
        "members": compiled(Members(chain), "inductor"),
        "fused": compiled(chain, ffn_fusion),
    }


def check() -> None:
    forms = [group.form for group in last_reports()[-1].groups]
    assert len(forms) == 1 and forms[0].startswith("grouped"), f"the chain was not fused: {forms}"


def summarise(cells: Sequence[Measurement]) -> dict[str, Any]:
    """Geometric means over the cells, and where fusing does not pay."""
    return {
        "geomean_over_unfused": geomean(cells, FASTER),
        "geomean_over_members": geomean(cells, OF_MEMBERS),
        "geomean_a_a": geomean(cells, CONTROL),
        "cells_below_0.97": sum(one.ratios[FASTER].high < 0.97 for one in cells),
        "cells_slower_than_members": sum(one.ratios[OF_MEMBERS].high < 0.97 for one in cells),
    }


BENCH = ChainBench(
    name="grouped_speed",
    about=__doc__,
    shapes=((256, 704), (1024, 2816)),
    tokens=(1, 32),
    ratios={FASTER: "speed over unfused", OF_MEMBERS: "speed over members", CONTROL: "A/A"},
    candidates=candidates,
    check=check,
    summarise=summarise,
    prediction="1.2x to 1.5x over unfused where oneDNN's layout counts (bfloat16, or 32 tokens), 1.1x elsewhere",
    rounds=20,
)

main = BENCH.main

if __name__ == "__main__":
    main()
