"""Chains of FFNs in real shapes: fused against everything a user would pick instead, and against the limit.

    python -m bench.grid [--seconds 150] [--rounds 12] [--continue]

On the CPU a small part of the grid: chains of 8 in the smallest real shape, and longer and shorter ones. The whole
grid is for a GPU: `python -m bench.gpu`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch

from bench.budget import Session
from bench.chains import control_of, first_calls, forms
from bench.limits import Limits, measure_limits
from bench.record import Measurement, Scalar
from bench.shapes import SHAPES, Cell
from bench.tables import ratio_table
from bench.timing import measure

NEEDS = 45.0  # seconds of one cell on two shared cores
PREDICTIONS = {
    "1 token": "fused, surgery and unfused within 5 % of each other: all read the same bytes",
    "concatenated by call": "slower than unfused at 1 token by 2x or more: it reads, writes and reads every weight",
    "share of the limit": "0.6 to 0.9 at 1 token in float32, less in bfloat16",
}


def measure_cell(
    cell: Cell, device: str, limits: Limits, modes: Sequence[str] = (), *, rounds: int, threads: int
) -> Measurement:
    """All forms of one cell, in turn. Ratios: of every form over the fused one of the same mode, and the control."""
    torch._dynamo.reset()
    runs, chain = forms(cell, device, modes)
    x = torch.randn(cell.tokens, cell.shape.hidden, device=device, dtype=cell.dtype)
    with torch.no_grad():
        seconds, errors = first_calls(runs, chain, x)
        calls = {name: lambda run=run: run(x) for name, run in runs.items()}
        samples = measure(calls, rounds=rounds, threads=threads, sample_seconds=0.01 if x.is_cuda else 0.02)
    found = Measurement.of(cell.place, samples, pairs(list(samples), control_of(modes)))
    limit = limits.seconds(cell.parameters, cell.tokens, cell.dtype)
    facts: dict[str, Scalar] = {"bytes": cell.parameters * cell.dtype.itemsize, "limit_seconds": limit}
    facts |= {f"first call, {name}": round(value, 3) for name, value in seconds.items()}
    facts |= {f"error, {name}": float(f"{value:.3g}") for name, value in errors.items()}
    facts |= shares(found, limit)
    return found.model_copy(update={"facts": facts})


def pairs(names: Sequence[str], control: str) -> list[tuple[str, str]]:
    """Each form against the fused one of its mode; the unfused one against its control."""
    fused = {name.partition(", ")[2]: name for name in names if name.startswith("fused")}
    modes = {name: name.partition(", ")[2] for name in names}
    against = [(name, fused[modes[name]]) for name in names if not name.startswith(("fused", control))]
    return [*against, (control.replace("unfused again", "unfused"), control)]


def shares(found: Measurement, limit: float) -> Mapping[str, Scalar]:
    """How much of the limit each form reaches: 1 is as fast as the machine allows."""
    return {f"share of limit, {name}": round(limit / one.value, 4) for name, one in found.medians.items()}


def on_the_cpu() -> list[Cell]:
    """What the CPU is asked for, most important first. Weights of 200 to 800 MB: no cache holds them."""
    one, float32, bfloat16 = SHAPES["1B"], torch.float32, torch.bfloat16
    return [
        Cell(one, 8, 1, bfloat16),
        Cell(one, 8, 16, bfloat16),
        Cell(one, 4, 1, float32),
        Cell(one, 2, 1, bfloat16),
        Cell(one, 15, 1, bfloat16),
        Cell(one, 4, 64, bfloat16),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="no cell is begun that would end after that")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the cells of an earlier run")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with Session("grid", seconds=chosen.seconds, fresh=not chosen.go_on) as session:
        limits = measure_limits("cpu")
        session.results["limits"] = limits.to_dict()
        session.predictions = PREDICTIONS
        for cell in on_the_cpu():
            run = lambda cell=cell: measure_cell(cell, "cpu", limits, rounds=chosen.rounds, threads=1)  # noqa: E731
            session.do(cell.place, run, needs=NEEDS)
    print(ratio_table(session.measurements, columns(session.measurements)))


def columns(found: Sequence[Measurement]) -> list[tuple[str, str]]:
    """Ratios and their headings, for the table."""
    names = dict.fromkeys(name for one in found for name in one.ratios)
    return [(name, "A/A" if "again" in name else f"{name.partition('/')[0]} over fused") for name in names]


if __name__ == "__main__":
    main()
