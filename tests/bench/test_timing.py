"""Ratios and medians with their intervals; samples are taken in turn."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
import torch

from bench.timing import measure, median, ratio


def test_a_ratio_is_of_rounds_not_of_means() -> None:
    drift = [1.0, 2.0, 4.0, 8.0] * 5  # a machine that gets slower: the same for both
    found = ratio([2 * one for one in drift], drift)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(200):
        slow, fast = ([draw.lognormvariate(mean, 0.1) for _ in range(30)] for mean in (0.2, 0.0))
        found = ratio(slow, fast, draws=400)
        hits += found.low <= 1.2214 <= found.high
    assert 0.89 <= hits / 200 <= 0.98


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_a_median_lies_in_its_interval() -> None:
    found = median([5.0, 1.0, 2.0, 3.0, 4.0])
    assert found.value == 3.0 and 1.0 <= found.low < 3.0 < found.high <= 5.0


def test_each_round_runs_every_candidate_once_in_an_order_of_its_own() -> None:
    order: list[str] = []

    def slow(name: str) -> None:
        order.append(name)
        time.sleep(2e-3)

    samples = measure({name: partial(slow, name) for name in "abc"}, rounds=7, threads=1, sample_seconds=1e-3)
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys("abc", 7)
    assert all(2e-3 <= one < 1.0 for found in samples.values() for one in found)
    warm_up, timed = order[:-21], order[-21:]
    assert warm_up == list("aabbcc"), "a call that is longer than a sample needs no more than that"
    rounds = ["".join(timed[start : start + 3]) for start in range(0, 21, 3)]
    assert all(sorted(one) == list("abc") for one in rounds) and len(set(rounds)) > 1


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    calls: list[int] = []
    before = torch.get_num_threads()
    (found,) = measure({"a": lambda: calls.append(torch.get_num_threads())}, rounds=3, threads=1).values()
    assert len(calls) > 1000 and max(found) < 1e-4
    assert set(calls) == {1} and torch.get_num_threads() == before
