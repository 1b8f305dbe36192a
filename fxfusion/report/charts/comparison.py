"""Methods side by side: how far each is from the intact model, by depth and by predicted latency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxfusion.report.charts.figure import Chart, hue, ink, inline, new_figure, plain_numbers, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "os^Dv"
_LEAST = 1e-6  # nats: what measures as less is rounding, and a logarithmic axis has no zero


@dataclass(frozen=True, slots=True)
class Curve:
    """`number`: of the method, which gives it its colour; `points`: FFN depth, milliseconds, KL [nats]."""

    name: str
    number: int
    repaired: bool
    points: tuple[tuple[float, float, float], ...]


def curves_of(cells: Iterable[tuple[str, bool, int | None, float | None, float | None]]) -> list[Curve]:
    """One for each method, as it is and refitted. Cells: method, whether refitted, FFN depth, milliseconds, KL; those
    that lack a number are on no curve."""
    points: dict[tuple[str, bool], list[tuple[float, float, float]]] = {}
    for method, repaired, ffns, latency_ms, kl in cells:
        if ffns is not None and latency_ms is not None and kl is not None:
            points.setdefault((method, repaired), []).append((ffns, latency_ms, kl))
    order = list(dict.fromkeys(method for method, _ in points))
    return [
        Curve(f"{method}{' + refit' if repaired else ''}", order.index(method), repaired, tuple(found))
        for (method, repaired), found in points.items()
    ]


def for_page(curves: Sequence[Curve], predicted_for: str) -> Chart | None:
    """None without a point."""
    if not curves:
        return None
    with style():
        figure = draw(curves, predicted_for)
        title = "KL to the intact model by FFN depth, and by predicted latency"
        return inline(figure, "comparison", title, "The table below holds the numbers.", over=figure.axes)


def draw(curves: Sequence[Curve], predicted_for: str) -> Figure:
    """Two panels; lines and points of refitted models are whole, others dashed and hollow. Inside of `style()`."""
    figure = new_figure(1000, 420)
    labels = ("FFN depth", f"predicted latency of a token (ms): {predicted_for}")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for place, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("log")
        for curve in curves:
            along = sorted((point[place], max(point[2], _LEAST)) for point in curve.points)
            axes.plot(
                [x for x, _ in along],
                [y for _, y in along],
                "-" if curve.repaired else "--",
                marker=_MARKERS[curve.number // 8 % len(_MARKERS)],
                color=hue(curve.number),
                markerfacecolor=hue(curve.number) if curve.repaired else ink("card"),
                label=curve.name,
            )
        axes.set_title("KL to the intact model (nats), log scale")
        axes.set_xlabel(label)
        axes.grid()
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
    if curves:
        panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
