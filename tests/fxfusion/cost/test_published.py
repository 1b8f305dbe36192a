"""The published latencies, from one set of constants: what was fitted, and what was not."""

from __future__ import annotations

import pytest

from fxfusion.cost import Hardware, simulate
from fxfusion.cost.published import LATENCIES, MEMBERS, RATIOS, TABLES

RUN = {"tp": 8, "precision": "fp8", "batch": 1}


def speed(name: str, hardware: str | Hardware = "h100") -> float:
    before = name == "253B before fusion"
    table = TABLES["253B" if before else name]
    return simulate(table, hardware=hardware, unfuse=MEMBERS if before else None, **RUN).tokens_per_second


@pytest.mark.parametrize("name", LATENCIES)
def test_a_published_latency(name: str) -> None:
    assert speed(name) == pytest.approx(LATENCIES[name], rel=0.15)
    assert speed(name) == pytest.approx(LATENCIES[name], rel=0.07)  # what is reached: see docs/cost.md


@pytest.mark.parametrize(("one", "other"), RATIOS)
def test_a_published_ratio(one: str, other: str) -> None:
    wanted = LATENCIES[one] / LATENCIES[other]
    assert speed(one) / speed(other) == pytest.approx(wanted, rel=0.07)
    assert speed(one) / speed(other) == pytest.approx(wanted, rel=0.04)


def test_the_published_latencies_can_be_missed() -> None:
    """Without the floor of a GEMM, what is left is bandwidth: 70B is then far too fast."""
    plain = Hardware.of("h100").model_copy(update={"gemm_floor": 0.0})
    assert speed("70B", plain) > 1.15 * LATENCIES["70B"]
    half = Hardware.of("h100").model_copy(update={"kernel_latency": 0.0})
    wanted = LATENCIES["253B"] / LATENCIES["253B before fusion"]
    assert speed("253B", half) / speed("253B before fusion", half) < 0.95 * wanted


def test_what_was_not_fitted() -> None:
    """Predictions, with what was published: H200 90.05 tokens/s, and 10 % less latency for 23 FFNs less of the 49B."""
    assert speed("253B", "h200") == pytest.approx(90.05, rel=0.15)
    before = simulate("nemotron-super-49b", **RUN)
    third = simulate("nemotron-super-49b", groups=[range(42, 51), range(53, 61), range(61, 70)], **RUN)
    assert before.ffns - third.ffns == 23
    gain = 1 - third.latency_ms / before.latency_ms
    assert 0.10 < gain < 0.17  # too much: see docs/cost.md
