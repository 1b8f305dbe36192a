"""The one table writer of all benchmarks: rows in, a plain or Markdown table out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from bench.record import Measurement
from bench.timing import Interval

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def table(rows: Iterable[Sequence[object]], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Text that lines up; cells are shown as they are given."""
    cells = [tuple("" if cell is None else cell for cell in row) for row in rows]
    return tabulate(cells, headers, tablefmt="github" if markdown else "simple", disable_numparse=True)


def times(found: Interval) -> str:
    """A ratio, such as "1.24x [1.20, 1.30]"."""
    return f"{found.value:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def seconds(value: float) -> str:
    """A duration with three digits, such as "12.3 ms"."""
    size, unit = next((pair for pair in _UNITS if abs(value) >= pair[0]), _UNITS[-1])
    return f"{value / size:.3g} {unit}"


def bytes_(value: float) -> str:
    """A size with three digits, such as "1.5 GiB"."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def ratio_table(
    measurements: Iterable[Measurement], columns: Sequence[tuple[str, str]], *, markdown: bool = False
) -> str:
    """One row for each measurement: its place, then the ratios of `columns` (name of the ratio, heading)."""
    found = list(measurements)
    places = list(dict.fromkeys(name for one in found for name in one.place))
    rows = [
        (
            *(one.place.get(name) for name in places),
            *(times(one.ratios[name]) if name in one.ratios else None for name, _ in columns),
        )
        for one in found
    ]
    return table(rows, [*places, *(heading for _, heading in columns)], markdown=markdown)


def by_kind(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """What was measured of chains, of windows and of whole models."""
    found: dict[str, list[Measurement]] = {"chains": [], "models": [], "windows": []}
    for one in measurements:
        kind = "chains" if "members" in one.place else "windows" if "windows" in one.place else "models"
        found[kind].append(one)
    return found
