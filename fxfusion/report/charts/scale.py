"""Axes: where a value stands, in percent, and which round numbers mark it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LOG_FROM = 20.0  # ratio of largest to smallest from which on a linear scale hides the small ones
_TICKS = 13  # at most so many layer numbers on an axis


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis; `at` in percent."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], log_from: float = _LOG_FROM, margin: float = 0.06) -> Scale:
        """An axis with all values on it, and some room at both ends. There must be a value."""
        found = sorted(values)
        low, high = found[0], found[-1]
        if low > 0 and high / low > log_from:
            room = (high / low) ** margin
            return cls(low / room, high * room, True)
        if low == high:
            margin, low, high = 0.0, low - (abs(low) or 1.0), high + (abs(high) or 1.0)
        pad = (high - low) * margin
        return cls(low - pad, high + pad)

    def share(self, value: float) -> float:
        """Where a value stands, in percent from the low end."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, max(value, self._least)))
        return round(100.0 * min(1.0, max(0.0, (at - low) / (high - low))), 2)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf

    def ticks(self, least: float = 0.0) -> tuple[Tick, ...]:
        """Round numbers, three to seven where the range has so many; on a linear axis at least `least` apart."""
        found = [value for value in self._decades() if self.low <= value <= self.high] if self.log else []
        if len(found) < 3:
            step = max(least, _round_step(self.high - self.low))
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            found = [index * step for index in range(first, last + 1)]
        return tuple(Tick(self.share(value), number(value)) for value in found)

    def _decades(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(powers) <= 3 else (1,)
        return [factor * 10.0**power for power in powers for factor in factors]


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, three to seven times in the span."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 8)


def number(value: float, digits: int = 3) -> str:
    """`12,288`, `0.0123`, `1.2e-07`: short, and without an exponent where a reader expects none."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{round(value, places):,.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and count of each run of successive numbers."""
    found: list[tuple[int, int]] = []
    for value in sorted(set(numbers)):
        if found and sum(found[-1]) == value:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((value, 1))
    return found


def layer_ticks(layers: Sequence[int]) -> tuple[Tick, ...]:
    """Numbers under the middle of some layers: all of a few, round ones of many."""
    count = len(layers)
    step = next((size for size in (1, 2, 5, 10, 20, 50, 100) if count / size <= _TICKS), 200)
    return tuple(Tick(_middle(at, count), str(layer)) for at, layer in enumerate(layers) if layer % step == 0)


def _middle(index: int, count: int) -> float:
    return round(100.0 * (index + 0.5) / count, 3)
