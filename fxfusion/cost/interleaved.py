"""Compare the speed of callables fairly: interleaved, in random order, with an interval.

A fixed order alone makes the first of two identical modules look several percent slower, so each round
times every callable once in a new random order, and only ratios within a round are compared. The one timer of the
command line, of `bench/` and of `engines/`; the scripts of the last run without this package and load this file by its
path, so it needs the standard library alone.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

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


def sample(
    calls: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0, *, sample_seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds per call, `rounds` samples for each name, after a warm-up of two calls or more.

    A sample is as many calls as `sample_seconds` hold, so that the clock's noise is small; at least one. A GPU that
    torch uses is waited for at its ends.
    """
    repeats = {name: _repeats(call, sample_seconds) for name, call in calls.items()}
    shuffle, order = random.Random(seed).shuffle, list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if repeats[name] > 1:
                calls[name]()  # what ran before has emptied the caches
            samples[name].append(_seconds(calls[name], repeats[name]))
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


def _repeats(call: Callable[[], object], sample_seconds: float) -> int:
    """Calls per sample, from a few timed ones. The first call may still compile, so it is not timed."""
    call()
    calls, spent = 1, _seconds(call, 1)
    while spent < sample_seconds / 4:
        calls *= 4
        spent = _seconds(call, calls) * calls
    return max(1, round(calls * sample_seconds / spent))


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Per call."""
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for_gpu()
    return (time.perf_counter() - start) / calls


def _wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    device = torch.get_device_module()  # of what accelerates this machine; of the CPU, which never waits, without one
    if not hasattr(device, "is_initialized") or device.is_initialized():
        device.synchronize()
