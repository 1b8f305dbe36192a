"""Interleaved timing: every round measures every candidate once, in an order drawn anew.

A fixed order alone makes the first of two identical modules look 4 to 15 % slower, and a shared
machine drifts; so only ratios inside one round are compared, and an A/A control (two compiles of the
same thing) shows how much of a difference is noise.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat
from torch import Tensor

Candidate = Callable[[], object]


class Interval(BaseModel):
    """An estimate with a 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value=value, low=value, high=value)

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def measure(
    candidates: Mapping[str, Candidate], *, rounds: int, threads: int, sample_seconds: float = 0.02, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of each candidate in each round, after a warm-up. Each sample is as many calls as
    `sample_seconds` hold, at least one; a GPU is waited for at its ends."""
    order, shuffle = list(candidates), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = {name: _calls(run, sample_seconds) for name, run in candidates.items()}
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                if calls[name] > 1:
                    candidates[name]()  # what ran before has emptied the caches
                samples[name].append(_seconds(candidates[name], calls[name]))
    finally:
        torch.set_num_threads(before)
    return samples


def _calls(run: Candidate, sample_seconds: float) -> int:
    """How many calls a sample holds, from a few timed ones. The first one, which may compile, is not timed."""
    run()
    calls, spent = 1, _seconds(run, 1)
    while spent < sample_seconds / 4:
        calls *= 4
        spent = _seconds(run, calls) * calls
    return max(1, round(calls * sample_seconds / spent))


def _seconds(run: Candidate, calls: int) -> float:
    """Per call."""
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait_for_gpu()
    return (time.perf_counter() - start) / calls


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(slow: Sequence[float], fast: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Interval:
    """How many times faster `fast` is than `slow`: geometric mean over the rounds. Rounded to four digits."""
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    low, high = _bootstrap(logs, lambda drawn: drawn.mean(1), seed, draws)
    ends = {"value": statistics.fmean(logs), "low": low, "high": high}
    return Interval(**{name: round(math.exp(end), 4) for name, end in ends.items()})


def median(samples: Sequence[float], *, seed: int = 0, draws: int = 500) -> Interval:
    """The median and its interval, in the samples' unit."""
    low, high = _bootstrap(samples, lambda drawn: drawn.quantile(0.5, dim=1), seed, draws)
    return Interval(value=statistics.median(samples), low=low, high=high)


def _bootstrap(
    samples: Sequence[float], estimate: Callable[[Tensor], Tensor], seed: int, draws: int
) -> tuple[float, float]:
    """Ends of the 95 % interval of an estimate; `estimate` takes resampled rounds `[draws, rounds]`."""
    values = torch.tensor(samples, dtype=torch.float64)
    drawn = torch.randint(len(samples), (draws, len(samples)), generator=torch.Generator().manual_seed(seed))
    found = estimate(values[drawn]).sort().values
    return float(found[int(0.025 * draws)]), float(found[max(0, int(0.975 * draws) - 1)])
