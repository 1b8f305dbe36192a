"""Compare the speed of callables fairly: interleaved, in random order, with an interval.

A fixed order alone makes the first of two identical modules look several percent slower, so each round
times every callable once in a new random order, and only ratios within a round are compared.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

_ROUND_SECONDS = 0.02  # a sample repeats its call until it lasts this long: the clock's noise is then small
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def sample(calls: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call, `rounds` samples for each name. Every callable is called once before to warm up."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        order = list(calls)
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return samples


def ratio(base: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio:
    """How much faster `other` is than `base`: the median over rounds, and a bootstrap interval of it."""
    logs = [math.log(slow / fast) for slow, fast in zip(base, other, strict=True)]
    if not logs:
        raise ValueError("there are no samples to compare")
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))
    low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]
    return Ratio(math.exp(median(logs)), math.exp(low), math.exp(high))


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _repeats(call: Callable[[], object]) -> int:
    """Calls per sample. The first call may still compile, so the second is timed."""
    call()
    start = time.perf_counter()
    call()
    return max(1, math.ceil(_ROUND_SECONDS / max(time.perf_counter() - start, 1e-6)))
