"""Everything that one GPU can tell, most important first, within a time: `bench/results/gpu.json`.

    python -m bench.gpu                       under 8 minutes on one GPU
    python -m bench.gpu --continue            goes on where the last run stopped or ran out of time
    python -m bench.gpu --device cpu --small  tiny shapes: does the script run?
    python -m bench.gpu --fit-cost-model      needs no GPU: how the three fitted constants of `fxfusion.cost` were found

Needs torch (2.11 or newer), transformers, networkx, tabulate and pydantic, and this checkout; no installation.

Order: limits of the machine; decoding in chains of 8 on slices of a 70B, on Super-49B's narrow FFNs and on slices of
a 405B, under CUDA graphs, against unfused max-autotune; whole models, and windows of one that keeps its attention; more
tokens; then the whole grid in Inductor's default mode. Every form is checked against the form that it must equal before
it is timed. The file is written after each part, and says what was left out.

Goals, at 1 to 16 tokens under CUDA graphs: at least 1.10x over unfused max-autotune on the 70B slice, 1.5x
on Super-49B's narrow FFNs, 0.90 of the bandwidth's limit on the 405B slice.

The fit: four published decode latencies (arXiv 2503.18908, table 2) and their three ratios against three constants of
the H100: the part of the memory bandwidth that large GEMMs reach, what a kernel costs at least, the least time of a
GEMM. The least sum of squares on a grid, each error in units of what is wanted (15 % of a latency, 7 % of a ratio).
Everything else comes from the sources in fxfusion/cost/devices/h100.json.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.grid import SHAPES, SMALL, Cell, Limits, columns, grid, measure_cell, measure_limits
from bench.record import Measurement, Session, arguments
from bench.show import by_kind, ratio_table, table
from bench.whole_models import PAIRS, SIZES, Case, Pair, WindowCase, measure_case, measure_windows, window_columns
from fxfusion.cost.hardware import Hardware
from fxfusion.cost.kernels import Workload
from fxfusion.cost.published import LATENCIES, RATIOS, published_step
from fxfusion.cost.sublayers import Step
from fxfusion.cost.timing import step_time

GRAPHS, AUTOTUNED = "reduce-overhead", "max-autotune"
PREDICTIONS = {
    "70B / 8, 8 members, 1 token": "fused max-autotune 1.15x to 1.4x over unfused max-autotune",
    "Super-49B, run, 8 members, 1 token": "1.2x to 1.6x: narrower members leave more of the GPU idle",
    "405B / 8, 8 members, 1 token": "fused reaches 0.85 to 0.95 of the bandwidth's limit",
    "2048 tokens": "1.0x to 1.1x: products of unfused members are large enough to fill the GPU",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure in some modes; `needs`: seconds that it takes at most."""

    of: Cell | Case | WindowCase
    modes: tuple[str, ...]
    needs: float

    @property
    def place(self) -> dict[str, str | int]:
        """Where it goes in the file. The last mode tells parts of one cell apart."""
        return {**self.of.place, "mode": self.modes[-1] if self.modes else "default"}


def parts(small: bool, gpu: bool) -> Iterator[Part]:
    """All of them, most important first."""
    modes = (GRAPHS, AUTOTUNED) if gpu else ()
    cells = list(grid(SMALL if small else SHAPES))
    decoding = [cell for cell in cells if cell.length == 8 and cell.tokens == 1 and cell.dtype == torch.bfloat16]
    few = [cell for cell in cells if cell.length == 8 and cell.tokens in (4, 16) and cell.dtype == torch.bfloat16]
    for cell in decoding[:3]:
        yield Part(cell, modes, 60.0)
    yield from whole(small, gpu)
    for cell in (*few[:3], *decoding[3:5]):
        yield Part(cell, modes, 60.0)
    for cell in cells:
        yield Part(cell, modes[:1], 25.0)


def whole(small: bool, gpu: bool) -> Iterator[Part]:
    """Decoding under CUDA graphs; prompts in the default mode."""
    modes = (GRAPHS,) if gpu else ()
    names = ("small",) if small else ("8B", "70B, 16 layers")
    context, prompt = (8, 16) if small else (512, 1024)
    for name in names:
        yield Part(Case(name, "decode", context, torch.bfloat16), modes, 75.0)
    windowed, lengths = ("small", (2,)) if small else ("8B, 8 layers", (4,))
    yield Part(WindowCase(Case(windowed, "decode", context, torch.bfloat16), lengths), modes, 75.0)
    for name in names:
        yield Part(Case(name, "prefill", prompt, torch.bfloat16), (), 60.0)
    yield Part(WindowCase(Case(windowed, "prefill", prompt, torch.bfloat16), lengths), (), 60.0)


class Runner:
    """Measures parts; keeps the last whole model, as the next part may be of it."""

    def __init__(self, device: str, limits: Limits, rounds: int) -> None:
        self.device, self.limits, self.rounds = device, limits, rounds
        self.held: tuple[str, Pair] | None = None

    def measure(self, part: Part) -> Measurement:
        of = part.of
        if not isinstance(of, Case):
            self.held = None
            self._free()
        if isinstance(of, Cell):
            found = measure_cell(of, self.device, self.limits, part.modes, rounds=self.rounds, threads=1)
        elif isinstance(of, WindowCase):
            model = SIZES[of.case.model].intact(of.case.dtype, self.device)
            found = measure_windows(of, model, part.modes, rounds=self.rounds, threads=1)
        else:
            mode = part.modes[-1] if part.modes else "default"
            pair = self._pair(of)
            found = measure_case(of, pair, self.limits, mode, rounds=self.rounds, threads=1)
        return found.model_copy(update={"place": part.place})

    def _pair(self, case: Case) -> Pair:
        if self.held is None or self.held[0] != case.model:
            self.held = None
            self._free()
            self.held = case.model, Pair.sized(case.model, case.dtype, self.device)
        return self.held[1]

    def _free(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def fits(cell: Cell, device: str) -> bool:
    """Whether the weights of all forms fit: the members, those that `fuse` made, and the backend's."""
    if device == "cpu":
        return True
    return 3.5 * cell.parameters * cell.dtype.itemsize < torch.cuda.get_device_properties(0).total_memory


# --- constants of the cost model ----------------------------------------------------------------------

WORK = Workload(precision="fp8", tp=8)
FRACTIONS = [0.80, 0.84, 0.88, 0.90, 0.92]  # above 0.92 no kernel reads memory, whatever its size
LATENCY_US = [value / 10 for value in range(10, 61, 2)]
FLOOR_US = [value / 2 for value in range(4, 61)]


def errors(steps: dict[str, Step], device: Hardware) -> dict[str, float]:
    """Logarithms of predicted over published, by latency and by ratio."""
    speeds = {name: 1 / step_time(step, WORK, device).seconds.total for name, step in steps.items()}
    found = {name: math.log(speeds[name] / LATENCIES[name]) for name in LATENCIES}
    for one, other in RATIOS:
        found[f"{one} / {other}"] = found[one] - found[other]
    return found


def score(found: dict[str, float]) -> float:
    return sum((value / (0.15 if name in LATENCIES else 0.07)) ** 2 for name, value in found.items())


def fit_cost_model() -> str:
    """The best constants for each fraction, and their errors."""
    h100 = Hardware.of("h100")
    steps = {name: published_step(name) for name in LATENCIES}
    tried = []
    for fraction, latency, floor in itertools.product(FRACTIONS, LATENCY_US, FLOOR_US):
        constants = {"bandwidth_fraction": fraction, "kernel_latency": latency / 1e6, "gemm_floor": floor / 1e6}
        found = errors(steps, h100.model_copy(update=constants))
        tried.append((score(found), fraction, latency, floor, *found.values()))
    names = ("score", "bandwidth_fraction", "kernel_latency [us]", "gemm_floor [us]", *errors(steps, h100))
    best = {fraction: min(row for row in tried if row[1] == fraction) for fraction in FRACTIONS}
    rows = [[*row[:4], *(f"{math.exp(value) - 1:+.1%}" for value in row[4:])] for row in best.values()]
    return table(zip(names, *rows, strict=True), ())


def main() -> None:
    parser = arguments(__doc__, seconds=450.0, rounds=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, recorded only where --out says")
    parser.add_argument("--parts", type=int, help="stop after so many parts")
    parser.add_argument("--out", type=Path, help="another file than bench/results/gpu.json")
    parser.add_argument("--fit-cost-model", action="store_true", help="fit constants of the cost model, no more")
    chosen = parser.parse_args()
    if chosen.fit_cost_model:
        print(fit_cost_model())
        return
    gpu = chosen.device != "cpu"
    if gpu and not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no GPU (try --device cpu --small to test the script)")
    if chosen.small and chosen.out is None:
        parser.error("--small needs --out: tiny shapes are no result")
    torch.set_float32_matmul_precision("highest")
    with Session("gpu", seconds=chosen.seconds, path=chosen.out, fresh=not chosen.go_on) as session:
        limits = measure_limits(chosen.device, small=chosen.small)
        session.results["limits"] = limits.to_dict()
        session.predictions = PREDICTIONS
        runner = Runner(chosen.device, limits, chosen.rounds)
        for part in list(parts(chosen.small, gpu))[: chosen.parts]:
            if isinstance(part.of, Cell) and not fits(part.of, chosen.device):
                session.left_out.append(f"{part.place}: does not fit into the memory")
                continue
            needs = 0.0 if chosen.small else part.needs
            session.do(part.place, partial(runner.measure, part), needs=needs)
    print(summary(session.measurements))


def summary(measurements: list[Measurement]) -> str:
    """A table for each kind, with the ratios that it has."""
    found = by_kind(measurements)
    heads = {
        "chains": columns(found["chains"]),
        "models": [(f"{a}/{b}", b) for a, b in PAIRS],
        "windows": window_columns(found["windows"]),
    }
    return "\n\n".join(ratio_table(kind, heads[name]) for name, kind in found.items() if kind)


if __name__ == "__main__":
    main()
