"""The one plot helper of all benchmarks: SVG files that change only when what they show does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.timing import Interval

Point = tuple[float, Interval | float]


def new_figure(*, x: str, y: str, title: str = "", size: tuple[float, float] = (7.0, 4.2)) -> tuple[Figure, Any]:
    """A figure with one pair of axes, in the style that all share."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    return figure, axes


def draw_lines(axes: Any, series: Mapping[str, Sequence[Point]], *, powers_of_two: bool = False) -> None:
    """One line for each of `series`, with error bars where a value is an interval."""
    for name, points in series.items():
        ends = [value if isinstance(value, Interval) else Interval.exact(value) for _, value in points]
        down = [max(0.0, one.value - one.low) for one in ends]
        up = [max(0.0, one.high - one.value) for one in ends]
        axes.errorbar(
            [at for at, _ in points], [one.value for one in ends], (down, up), fmt="o-", ms=3, capsize=2, label=name
        )
    if powers_of_two:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({at for points in series.values() for at, _ in points}))
        axes.xaxis.set_major_formatter("{x:g}")


def save(figure: Figure, path: Path) -> Path:
    """The same plot is the same file: its ids are drawn by name, not by chance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "fxfusion"}):
        figure.savefig(path, metadata={"Date": None})
    return path
