"""Samples are taken in turn, as often as they must be; a ratio holds the truth."""

from __future__ import annotations

import math
import random
import time
from functools import partial
from typing import Any

import pytest

from fxfusion.cost.interleaved import Ratio, median, ratio, sample


def test_ratio_finds_a_known_speed_up_and_none_between_equals() -> None:
    draw = random.Random(1)

    def noisy(seconds: float) -> list[float]:
        return [seconds * math.exp(draw.gauss(0, 0.05)) for _ in range(60)]

    base = noisy(1.0)
    faster, control = ratio(base, noisy(0.8)), ratio(base, noisy(1.0))
    assert faster.low < 1.25 < faster.high and faster.low > 1.1
    assert control.low < 1.0 < control.high
    assert str(Ratio(1.254, 1.2, 1.3)) == "1.25x [1.20, 1.30]"
    with pytest.raises(ValueError, match="no samples"):
        ratio([], [])


def test_samples_are_taken_in_random_order_and_per_call() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Any:
        return lambda: (order.append(name), time.sleep(seconds))

    samples = sample({"a": call("a", 0.03), "b": call("b", 0.009)}, rounds=8)
    assert [len(found) for found in samples.values()] == [8, 8]
    assert 1.5 < median(samples["a"]) / median(samples["b"]) < 5.0
    runs = "".join(order)
    assert "abbb" in runs and "bbba" in runs, "three calls of b: one that fills the caches, two that are a sample"


def test_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0 and median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_each_round_runs_every_candidate_once_in_an_order_of_its_own() -> None:
    order: list[str] = []

    def slow(name: str) -> None:
        order.append(name)
        time.sleep(2e-3)

    samples = sample({name: partial(slow, name) for name in "abc"}, rounds=7, sample_seconds=1e-3)
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys("abc", 7)
    assert all(2e-3 <= one < 1.0 for found in samples.values() for one in found)
    warm_up, timed = order[:-21], order[-21:]
    assert warm_up == list("aabbcc"), "a call that is longer than a sample needs no more than that"
    rounds = ["".join(timed[start : start + 3]) for start in range(0, 21, 3)]
    assert all(sorted(one) == list("abc") for one in rounds) and len(set(rounds)) > 1
