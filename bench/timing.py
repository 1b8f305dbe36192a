"""Interleaved timing: every round measures every candidate once, in an order drawn anew.

A fixed order alone makes the first of two identical modules look 4 to 15 % slower, and a shared
machine drifts; so only ratios inside one round are compared, and an A/A control (two compiles of the
same thing) shows how much of a difference is noise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.utils.benchmark import Timer

Candidate = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Geometric mean of per-round ratios, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def measure(
    candidates: Mapping[str, Candidate], *, rounds: int, threads: int, sample_seconds: float = 0.02, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of each candidate in each round, after a warm-up."""
    order = list(candidates)
    shuffle = random.Random(seed)
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in candidates.items()}
    calls = {}
    for name, timer in timers.items():
        timer.timeit(3)
        calls[name] = max(1, round(sample_seconds / max(timer.timeit(3).mean, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(timers[name].timeit(calls[name]).mean)
    return samples


def ratio(slow: Sequence[float], fast: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Ratio:
    """How many times faster `fast` is than `slow`, round by round."""
    logs = [a / b for a, b in zip(slow, fast, strict=True)]
    draw = random.Random(seed)
    means = sorted(statistics.geometric_mean(draw.choices(logs, k=len(logs))) for _ in range(draws))
    return Ratio(statistics.geometric_mean(logs), means[int(0.025 * draws)], means[int(0.975 * draws) - 1])
