"""Budget: what it refuses, and what it allows."""

from __future__ import annotations

from typing import Any

import pytest

from fxfusion.analysis.quality import Estimate, Quality
from fxfusion.errors import OptionError
from fxfusion.planning.budget import Budget


def quality(increase: float, kl: float) -> Quality:
    one = Estimate(1.0, 1.0, 1.0)
    return Quality(
        loss=one,
        perplexity=one.exp(),
        tokens=10,
        sequences=2,
        kl=Estimate(kl, kl, kl),
        top1=one,
        top5=one,
        loss_increase=Estimate(increase, increase, increase),
    )


def test_perplexity_is_relative_and_kl_absolute() -> None:
    assert Budget(max_perplexity_increase=0.11).allows(quality(0.1, 9.0))  # exp(0.1) = 1.105
    assert not Budget(max_perplexity_increase=0.10).allows(quality(0.1, 0.0))
    assert Budget(max_kl=0.2).allows(quality(9.0, 0.2)) and not Budget(max_kl=0.2).allows(quality(0.0, 0.21))
    assert Budget().allows(quality(99.0, 99.0)) and not Budget().limits_quality
    assert not Budget(max_kl=0.2).allows(quality(0.0, float("nan"))), "what was not measured is not within a budget"


def test_drop_is_a_number_or_a_fraction() -> None:
    assert Budget(drop=3).count(12) == 3 and Budget(drop=0.25).count(12) == 3 and Budget().count(12) is None
    assert Budget(drop=1.0).count(12) == 12 and Budget(drop=1).count(12) == 1
    with pytest.raises(OptionError, match="drop: 13 attention layers are to go, the model has 12"):
        Budget(drop=13).count(12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop": -1}, "drop"),
        ({"drop": 1.5}, "fraction is at most 1.0"),
        ({"drop": True}, "drop"),
        ({"max_kl": float("nan")}, "max_kl"),
        ({"max_perplexity_increase": -0.1}, "max_perplexity_increase"),
        ({"target_depth": -2}, "target_depth"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Budget(**fields)
