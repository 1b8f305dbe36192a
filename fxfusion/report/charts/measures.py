"""Plans of a sweep as points, and single measures with their intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxfusion.report.charts.figure import Chart, ink, inline, new_figure, plain_numbers, style, with_spots
from fxfusion.report.results import Interval, SweepPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_LOG_FROM = 4.0  # ratio of largest to smallest loss or perplexity from which on the axis is logarithmic
_ROOM = 0.06  # at both ends of an axis, of its length


def panels(sweep: Sequence[SweepPoint], titles: Sequence[str]) -> list[Chart]:
    """Quality against depth, and against fused bytes where they are known. Empty without a measured quality."""
    largest = max((point.fused_bytes or 0 for point in sweep), default=0)
    size, unit = next(((size, unit) for size, unit in _UNITS if largest >= size), _UNITS[-1])
    weights = [None if point.fused_bytes is None else point.fused_bytes / size for point in sweep]
    across: list[tuple[str, Sequence[float | None]]] = [
        ("FFN depth: FFNs that are left, a group is one", [point.depth for point in sweep])
    ]
    across += [(f"fused weights ({unit})", weights)] if largest else []
    found = (_panel(f"sweep{index}", sweep, titles, *one) for index, one in enumerate(across))
    return [chart for chart in found if chart is not None]


def _panel(
    name: str, sweep: Sequence[SweepPoint], titles: Sequence[str], label: str, places: Sequence[float | None]
) -> Chart | None:
    up, measures = quality_of(sweep)
    shown = [
        (index, place, one, one.value)
        for index, (place, one) in enumerate(zip(places, measures, strict=True))
        if place is not None and one is not None and one.value is not None
    ]
    if not shown:
        return None
    with style():
        figure = draw_panel([(place, one, sweep[at].front) for at, place, one, _ in shown], label, up)
        (axes,) = figure.axes
        chart = inline(figure, name, f"{up} of each plan, by {label}", "The table below holds them.", over=[axes])
        found = [(place, value, titles[at], f"#sweep-{at}") for at, place, _, value in shown]
        return with_spots(chart, figure, axes, found)


def quality_of(sweep: Sequence[SweepPoint]) -> tuple[str, list[Interval | None]]:
    """What the plot shows upwards: perplexity where any plan has it, else the loss."""
    if any(point.perplexity and point.perplexity.value is not None for point in sweep):
        return "perplexity", [point.perplexity for point in sweep]
    return "loss (nats per token)", [point.loss for point in sweep]


def draw_panel(points: Sequence[tuple[float, Interval, bool]], across: str, up: str) -> Figure:
    """Points by place, measure and whether they are on the front; a line goes through the front."""
    figure = new_figure(480, 320)
    axes: Any = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    ends = [end for _, one, _ in points for end in (one.value, one.low, one.high) if end is not None]
    log = min(ends) > 0 and max(ends) / min(ends) > _LOG_FROM
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(*_limits(ends, log))
    for place, one, front in points:
        _whisker(axes, one, place)
        face = ink("h0") if front else ink("card")
        edge = ink("h0") if front else ink("soft")
        look = {"markersize": 9, "markerfacecolor": face, "markeredgecolor": edge, "markeredgewidth": 1.5}
        axes.plot([place], [one.value], "o", zorder=4 if front else 3, **look)
    best = best_of([(place, one.value or 0.0) for place, one, front in points if front])
    axes.plot([place for place, _ in best], [value for _, value in best], color=ink("h0"), zorder=2)
    axes.set_title(up + (", log scale" if log else ""))
    axes.set_xlabel(across)
    axes.grid()
    plain_numbers(axes.xaxis)
    if all(float(place).is_integer() for place, _, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    plain_numbers(axes.yaxis)
    return figure


def best_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that none of them beats in what this plot shows, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def measures(
    name: str, label: str, rows: Sequence[tuple[str, Interval | None]], anchor: float | None = None
) -> Chart | None:
    """Each measure with its interval on one axis; `anchor`: where there is no difference. None without a measure."""
    if not any(one and one.value is not None for _, one in rows):
        return None
    with style():
        figure = draw_measures(label, rows, anchor)
        return inline(figure, name, f"{label}, with intervals", "The table above holds the numbers.", over=figure.axes)


def draw_measures(label: str, rows: Sequence[tuple[str, Interval | None]], anchor: float | None) -> Figure:
    """From top to bottom."""
    names = [textwrap.fill(name, 24) for name, _ in rows]
    lines = 1 + max(name.count("\n") for name in names)
    figure = new_figure(430, (16 * lines + 14) * len(rows) + 46)
    axes: Any = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    ends = [end for _, one in rows if one for end in (one.value, one.low, one.high) if end is not None]
    ends += [] if anchor is None else [anchor]
    axes.set_xlim(*_limits(ends))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for at, (_, one) in enumerate(rows):
        if one is not None and one.value is not None:
            _whisker(axes, one, at, across=True)
            axes.plot([one.value], [at], "o", color=ink("h0"), markersize=9)
    if anchor is not None:
        axes.axvline(anchor, color=ink("soft"), linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(rows)), labels=names, color=ink("text"))
    axes.set_xlabel(label)
    axes.grid(axis="y")
    plain_numbers(axes.xaxis)
    return figure


def _limits(ends: Sequence[float], log: bool = False) -> tuple[float, float]:
    """An axis with all values on it, and some room at both ends."""
    low, high = min(ends), max(ends)
    if log:
        return low / (high / low) ** _ROOM, high * (high / low) ** _ROOM
    room = _ROOM * (high - low) or abs(low) or 1.0
    return low - room, high + room


def _whisker(axes: Any, one: Interval, at: float, across: bool = False) -> None:
    """An interval that is open at one end goes on to the end of the axis."""
    if one.low is None and one.high is None:
        return
    lowest, highest = axes.get_xlim() if across else axes.get_ylim()
    ends = [lowest if one.low is None else one.low, highest if one.high is None else one.high]
    place = [at, at]
    axes.plot(*((ends, place) if across else (place, ends)), color=ink("soft"), linewidth=2.5 if across else 1.2)
