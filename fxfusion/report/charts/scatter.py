"""Plans of a sweep as points, and single measures as dots with whiskers. Paths in percent both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxfusion.report.charts.scale import Scale, Tick, number
from fxfusion.report.results import Interval, SweepPoint

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_LOG_FROM = 4.0  # ratio of largest to smallest loss or perplexity from which on the axis is logarithmic


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`index`: of the plan in the sweep."""

    index: int
    left: float
    top: float
    front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot. `front`: path of the Pareto front; `whiskers`: path of the intervals."""

    across: str
    up: str
    across_ticks: tuple[Tick, ...]
    up_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    front: str
    whiskers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """A measure on its axis, in percent."""

    at: float
    left: float
    width: float


def panels(sweep: Sequence[SweepPoint]) -> list[Panel]:
    """Quality against depth, and against fused bytes where they are known. Empty without a measured quality."""
    name, measures = quality_of(sweep)
    largest = max((point.fused_bytes or 0 for point in sweep), default=0)
    size, unit = next(((size, unit) for size, unit in _UNITS if largest >= size), _UNITS[-1])
    weights = [None if point.fused_bytes is None else point.fused_bytes / size for point in sweep]
    found = [_panel(sweep, measures, [point.depth for point in sweep], "FFN depth", name)]
    if largest:
        found.append(_panel(sweep, measures, weights, f"fused weights ({unit})", name))
    return [panel for panel in found if panel is not None]


def quality_of(sweep: Sequence[SweepPoint]) -> tuple[str, list[Interval | None]]:
    """What the plot shows upwards: perplexity where any plan has it, else the loss."""
    if any(point.perplexity and point.perplexity.value is not None for point in sweep):
        return "perplexity", [point.perplexity for point in sweep]
    return "loss (nats per token)", [point.loss for point in sweep]


def _panel(
    sweep: Sequence[SweepPoint],
    measures: Sequence[Interval | None],
    places: Sequence[float | None],
    across: str,
    up: str,
) -> Panel | None:
    shown = [
        (index, place, found.value, found)
        for index, (place, found) in enumerate(zip(places, measures, strict=True))
        if place is not None and found is not None and found.value is not None
    ]
    if not shown:
        return None
    over = Scale.around([place for _, place, _, _ in shown], log_from=float("inf"))
    ends = [end for _, _, value, found in shown for end in (value, found.low, found.high) if end is not None]
    scale = Scale.around(ends, log_from=_LOG_FROM)
    points = tuple(
        Point(index=index, left=over.share(place), top=100 - scale.share(value), front=sweep[index].front)
        for index, place, value, _ in shown
    )
    drawn = [(over.share(place), _whisker(found, scale)) for _, place, _, found in shown]
    whiskers = "".join(f"M{at:g} {100 - one.left:g}v-{one.width:g}" for at, one in drawn if one and one.width)
    return Panel(
        across=across,
        up=up + (", log scale" if scale.log else ""),
        across_ticks=over.ticks(least=1.0 if all(float(place).is_integer() for _, place, _, _ in shown) else 0.0),
        up_ticks=scale.ticks(),
        points=points,
        front=_front([point for point in points if point.front]),
        whiskers=whiskers,
    )


def _front(points: Sequence[Point]) -> str:
    """Path through those points that none of them beats in what this plot shows."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.left, -point.top)):
        if not best or point.top > best[-1].top:
            best.append(point)
    return "M" + "L".join(f"{point.left:g} {point.top:g}" for point in best) if len(best) > 1 else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Measures on one axis from `low` to `high`; `anchor`: where "no difference" stands on it, in percent."""

    rows: tuple[Whisker | None, ...]
    low: str
    high: str
    anchor: float | None


def strip(found: Sequence[Interval | None], anchor: float | None = None) -> Strip | None:
    """Each measure on the same axis; None without a measure."""
    ends = [end for one in found if one for end in (one.value, one.low, one.high) if end is not None]
    if not ends:
        return None
    scale = Scale.around([*ends, *([] if anchor is None else [anchor])])
    return Strip(
        rows=tuple(_whisker(one, scale) for one in found),
        low=number(scale.low),
        high=number(scale.high),
        anchor=None if anchor is None else scale.share(anchor),
    )


def _whisker(found: Interval | None, scale: Scale) -> Whisker | None:
    """Without an interval it has no width; an interval that is open at one end goes on to the end of the axis."""
    if found is None or found.value is None:
        return None
    at = scale.share(found.value)
    if found.low is None and found.high is None:
        return Whisker(at=at, left=at, width=0.0)
    low = 0.0 if found.low is None else scale.share(found.low)
    high = 100.0 if found.high is None else scale.share(found.high)
    return Whisker(at=at, left=low, width=round(high - low, 2))
