"""The learning rate of each step."""

from __future__ import annotations

import pytest
import torch

from fxfusion.recovery.training import Training


def test_the_rate_rises_and_falls() -> None:
    training = Training(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [training.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 == max(rates)
    assert all(one > two for one, two in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(0.55) and 0.1 < rates[99] < 0.101
    assert Training(steps=1, warmup=0.0).rate(0) == Training(steps=1).top_rate


def test_what_is_computed_in() -> None:
    assert Training(steps=1).autocast(torch.float32) is None
    assert Training(steps=1).autocast(torch.bfloat16) is torch.bfloat16
    assert Training(steps=1, precision="float32").autocast(torch.bfloat16) is None
    assert Training(steps=1, precision="bfloat16").autocast(torch.float32) is torch.bfloat16
