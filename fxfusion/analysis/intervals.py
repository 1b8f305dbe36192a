"""A measured number with its 95 % interval, by a bootstrap over sequences.

The tokens of one sequence share a topic and are no independent draws, while sequences (or prompts) are taken
as such. So the bootstrap draws whole sequences, with replacement, and computes the mean per token again.

The interval is the percentile interval, expanded for few sequences: its tails are those of Student's t, and it is
wider by sqrt(n / (n - 1)), which makes good that resamples vary less than the population does. It never leaves
the range of the data, so that an agreement stays between 0 and 1. With fewer than about ten sequences it can still
be too narrow, as no resample goes beyond the sequences seen.

Source: T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.1.2 (expanded percentile);
        Abramowitz and Stegun, 26.7.5 (quantiles of Student's t).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from torch import Tensor

Bounds = tuple[float, float]

UNBOUNDED: Bounds = (-math.inf, math.inf)
POSITIVE: Bounds = (0.0, math.inf)
FRACTION: Bounds = (0.0, 1.0)

_TAIL = 0.025  # of the probability, below and above the interval
_CHUNK_ELEMENTS = 2**21  # of the resampled weights held at once (16 MB)
_FEWEST_RESAMPLES = 100


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval.

    `float(e)` and `f"{e:.2f}"` give the value, `str(e)` and `f"{e}"` all three numbers.
    """

    value: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def to_dict(self) -> dict[str, float | None]:
        """The three numbers; those that are not finite are None, so that the dict is valid JSON."""
        return {name: number if math.isfinite(number) else None for name, number in asdict(self).items()}

    def below_zero(self, choices: int = 1) -> bool:
        """Whether the interval lies below zero, widened (Bonferroni) where this is the best of so many tries."""
        normal = NormalDist()
        widen = normal.inv_cdf(_TAIL / choices) / normal.inv_cdf(_TAIL)
        return self.value + widen * (self.high - self.value) < 0

    def exp(self) -> Estimate:
        """`exp` of all three numbers: the perplexity of a loss, the ratio of perplexities of a loss increase."""
        return Estimate(_exp(self.value), _exp(self.low), _exp(self.high))


def ratio_estimates(
    sums: Tensor, counts: Tensor, bounds: list[Bounds], *, resamples: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Mean per token of several measures, with paired intervals: all measures see the same resamples.

    Args:
        sums: `[sequences, measures]`, each measure summed over the tokens of a sequence.
        counts: `[sequences]`, the number of those tokens, each at least 1.
        bounds: for each measure the range that its definition allows: its interval when there is one sequence.
        resamples: number of bootstrap draws, at least 100.
        seed: decides the draws. Equal numbers of sequences get equal draws, on every machine.

    Returns:
        One estimate per measure. The interval of a value that is not finite is NaN.
    """
    if resamples < _FEWEST_RESAMPLES:
        raise ValueError(f"resamples must be at least {_FEWEST_RESAMPLES} for a 95 % interval, got {resamples}")
    sums, counts = sums.double(), counts.double()
    values = sums.sum(dim=0) / counts.sum()
    units = len(counts)
    if units == 1:
        low, high = torch.tensor(bounds, dtype=torch.float64).T
    else:
        drawn = _resampled(sums, counts, resamples, seed)
        tail = _tail(units)
        low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    finite = values.isfinite()
    low, high = low.where(finite, math.nan), high.where(finite, math.nan)
    return [Estimate(*numbers) for numbers in zip(values.tolist(), low.tolist(), high.tolist(), strict=True)]


def mean_estimate(values: Tensor, bounds: Bounds = UNBOUNDED, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of `values` `[units]`, one number per independent unit, as `ratio_estimates` otherwise."""
    counts = torch.ones(len(values), dtype=torch.float64)
    return ratio_estimates(values[:, None], counts, [bounds], resamples=resamples, seed=seed)[0]


def _resampled(sums: Tensor, counts: Tensor, resamples: int, seed: int) -> Tensor:
    """The means per token of each resample: `[resamples, measures]`."""
    units, generator = len(counts), torch.Generator().manual_seed(seed)
    # A value that is not finite must not reach the others through 0 * inf; its own interval is not used.
    columns = torch.cat([sums.nan_to_num(0.0, 0.0, 0.0), counts[:, None]], dim=1)
    parts = []
    for start in range(0, resamples, step := max(1, _CHUNK_ELEMENTS // units)):
        rows = min(step, resamples - start)
        drawn = torch.randint(units, (rows, units), generator=generator)
        drawn += torch.arange(rows)[:, None] * units
        weights = torch.bincount(drawn.flatten(), minlength=rows * units).view(rows, units)
        parts.append(weights.double() @ columns)
    totals = torch.cat(parts)
    return totals[:, :-1] / totals[:, -1:]


def _tail(units: int) -> float:
    """Probability on either side of the expanded percentile interval."""
    normal = NormalDist()
    z, freedom = -normal.inv_cdf(_TAIL), units - 1
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return normal.cdf(-student * math.sqrt(units / freedom))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
