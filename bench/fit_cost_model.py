"""How the three fitted constants of `fxfusion.cost` were found: `python -m bench.fit_cost_model`.

Four published decode latencies (arXiv 2503.18908, table 2) and their three ratios against three constants of the H100:
the part of the memory bandwidth that large GEMMs reach, what a kernel costs at least, the least time of a GEMM. The
least sum of squares on a grid, each error in units of what is wanted (15 % of a latency, 7 % of a ratio). Everything
else comes from the sources in fxfusion/cost/devices/h100.json.
"""

from __future__ import annotations

import itertools
import math

from tabulate import tabulate

from fxfusion.cost.hardware import Hardware
from fxfusion.cost.kernels import Workload
from fxfusion.cost.published import LATENCIES, RATIOS, published_step
from fxfusion.cost.sublayers import Step
from fxfusion.cost.timing import step_time

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


def main() -> None:
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
    print(tabulate([*zip(names, *rows, strict=True)]))


if __name__ == "__main__":
    main()
