from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxfusion.analysis import intervals
from fxfusion.analysis.intervals import (
    FRACTION,
    POSITIVE,
    UNBOUNDED,
    Estimate,
    mean_estimate,
    ratio_estimates,
)

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=generator(seed), dtype=torch.float64)


def test_the_value_is_the_mean_per_token_not_per_sequence() -> None:
    sums = torch.tensor([[10.0, 1.0], [2.0, 4.0]])
    loss, other = ratio_estimates(sums, torch.tensor([10, 1]), [UNBOUNDED, UNBOUNDED])
    assert (loss.value, other.value) == (12 / 11, 5 / 11)


def test_many_values_give_nearly_the_normal_interval() -> None:
    data = values(500)
    found = mean_estimate(data, resamples=20_000)
    margin = 1.959964 * float(data.std()) / math.sqrt(500)
    assert found.high - found.value == pytest.approx(margin, rel=0.05)
    assert found.value - found.low == pytest.approx(margin, rel=0.05)


def uniform(count: int, seeded: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(count, generator=seeded, dtype=torch.float64), torch.ones(count)


def agreement(count: int, seeded: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of 50 tokens each: sequences differ in how well the models agree, by 0.8 on average."""
    rates = 0.6 + 0.4 * torch.rand(count, generator=seeded, dtype=torch.float64)
    tokens = torch.full((count,), 50.0, dtype=torch.float64)
    return torch.binomial(tokens, rates, generator=seeded), tokens


def lengths(count: int, seeded: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of 10 to 99 tokens with a skewed mean, exp of a normal draw; the mean over tokens is exp(0.08)."""
    counts = torch.randint(10, 100, (count,), generator=seeded)
    return counts * torch.exp(0.4 * torch.randn(count, generator=seeded, dtype=torch.float64)), counts


@pytest.mark.parametrize(("draw", "truth"), [(uniform, 0.5), (agreement, 0.8), (lengths, math.exp(0.08))])
@pytest.mark.parametrize("count", [10, 40])
def test_the_interval_covers_the_truth_in_about_95_of_100_cases(draw: Draw, truth: float, count: int) -> None:
    seeded, hits, narrow = generator(11), 0, 0
    for _ in range(400):
        sums, counts = draw(count, seeded)
        found = ratio_estimates(sums[:, None], counts, [UNBOUNDED], resamples=500)[0]
        hits += found.low <= truth <= found.high
        half = (found.low + found.value) / 2, (found.high + found.value) / 2
        narrow += half[0] <= truth <= half[1]
    assert 0.88 <= hits / 400 <= 0.985
    assert narrow / 400 < 0.8  # the count can fail: half the interval covers much less


def test_without_the_expansion_few_sequences_are_covered_too_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    def covered() -> float:
        seeded, hits = generator(5), 0
        for _ in range(400):
            found = mean_estimate(torch.randn(5, generator=seeded), resamples=500)
            hits += found.low <= 0 <= found.high
        return hits / 400

    expanded = covered()
    monkeypatch.setattr(intervals, "_tail", lambda units: 0.025)
    assert covered() < 0.88 < expanded


def test_the_tail_is_students() -> None:
    """Against tabled quantiles of t: 2.776 (4 degrees of freedom), 2.262 (9), 1.984 (99)."""
    for units, student in ((5, 2.776), (10, 2.262), (100, 1.984)):
        z = student * math.sqrt(units / (units - 1))
        assert intervals._tail(units) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=0.03)


def test_intervals_are_paired() -> None:
    """The same resamples for all measures: a column and its double have intervals in the same proportion."""
    data = values(20)
    once, twice, other = ratio_estimates(
        torch.stack([data, 2 * data, values(20, seed=9)], dim=1), torch.ones(20), [UNBOUNDED] * 3
    )
    assert (twice.low, twice.high) == pytest.approx((2 * once.low, 2 * once.high))
    assert other.low != pytest.approx(once.low)


def test_a_constant_has_an_interval_of_no_width() -> None:
    counts = torch.tensor([3, 50, 7, 11])
    zero, one = ratio_estimates(torch.stack([0 * counts, counts], dim=1), counts, [UNBOUNDED] * 2)
    assert (zero, one) == (Estimate(0, 0, 0), Estimate(1, 1, 1))


def test_a_single_sequence_gets_what_the_definition_allows() -> None:
    found = ratio_estimates(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4]), [POSITIVE, FRACTION, UNBOUNDED])
    assert found == [Estimate(0.25, 0, math.inf), Estimate(0.5, 0, 1), Estimate(0.75, -math.inf, math.inf)]


def test_what_is_not_finite_spoils_its_own_interval_only() -> None:
    data = torch.stack([values(10), values(10), values(10)], dim=1)
    data[3, 1], data[4, 2] = math.nan, math.inf
    good, nan, infinite = ratio_estimates(data, torch.ones(10), [UNBOUNDED] * 3)
    assert good == ratio_estimates(data[:, :1], torch.ones(10), [UNBOUNDED])[0]
    assert math.isfinite(good.low) and math.isfinite(good.high)
    assert math.isnan(nan.value) and math.isnan(nan.low)
    assert infinite.value == math.inf and math.isnan(infinite.low) and math.isnan(infinite.high)


def test_resampling_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = values(30)
    whole = mean_estimate(data)
    monkeypatch.setattr(intervals, "_CHUNK_ELEMENTS", 30 * 7)
    assert mean_estimate(data) == whole != mean_estimate(data, seed=1)


def test_too_few_resamples() -> None:
    with pytest.raises(ValueError, match="at least 100"):
        mean_estimate(values(5), resamples=99)


def test_estimate_reads_like_a_number() -> None:
    estimate = Estimate(12.3456, 12.1, 12.6)
    assert float(estimate) == 12.3456
    assert f"{estimate:.2f}" == "12.35"
    assert f"{estimate}" == str(estimate) == "12.35 [12.1, 12.6]"
    with pytest.raises(AttributeError):
        estimate.value = 1.0  # type: ignore[misc]


def test_estimate_to_dict_and_exp() -> None:
    estimate = Estimate(0.0, -math.inf, 5000.0)
    assert estimate.to_dict() == {"value": 0.0, "low": None, "high": 5000.0}
    assert estimate.exp() == Estimate(1.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("estimate", "choices", "below"),
    [
        (Estimate(-1.0, -1.9, -0.1), 1, True),
        (Estimate(-1.0, -1.9, -0.1), 2, False),  # z is 2.24 for the best of two, 1.96 for one
        (Estimate(-1.0, -1.8, -0.2), 2, True),
        (Estimate(-1.0, -3.0, 1.0), 1, False),
        (Estimate(1.0, 0.5, 1.5), 1, False),
        (Estimate(0.0, 0.0, 0.0), 1, False),
        (Estimate(-1.0, -math.inf, math.inf), 1, False),  # one sequence says nothing
        (Estimate(math.nan, math.nan, math.nan), 1, False),
    ],
)
def test_below_zero_is_beyond_chance(estimate: Estimate, choices: int, below: bool) -> None:
    assert estimate.below_zero(choices) == below
