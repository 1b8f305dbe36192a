"""Lines and points over one or more axes, for files: what a sweep or a forecast found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fxfusion.report.charts.figure import hue, ink, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points `(x, y)` in the order of the line. `look`: format of matplotlib; `front`: in the colour of text."""

    label: str
    points: Sequence[tuple[float, float]]
    look: Literal["o", "o-", "-"] = "o-"
    front: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes. `log`: base of the logarithmic axis that a direction has; `level`: where nothing changes."""

    across: str
    up: str
    lines: Sequence[Line]
    title: str = ""
    log_x: int | None = None
    log_y: int | None = None
    level: float | None = None


def draw_panels(
    panels: Sequence[Panel], title: str, *, width: float = 480, share_y: bool = False, columns: int | None = None
) -> Figure:
    """The panels side by side, in full rows of `columns` (default: one row), each of so many pixels, under a title.

    `share_y`: those of a row have one scale.
    """
    across = columns or len(panels)
    down = len(panels) // across
    figure = new_figure(width * across, 320 if down == 1 else 250 * down)
    cells = figure.subplots(down, across, sharey="row" if share_y else False, squeeze=False)
    for axes, panel in zip(cells.flat, panels, strict=True):
        _draw(axes, panel)
    figure.suptitle(title)
    return figure


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogFormatter

    for number, line in enumerate(panel.lines):
        colour = ink("text") if line.front else hue(number)
        places, values = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(places, values, line.look, color=colour, label=line.label, markersize=4)
    if panel.level is not None:
        axes.axhline(panel.level, color=ink("soft"), linewidth=0.8)
    for base, scale, axis in ((panel.log_x, axes.set_xscale, axes.xaxis), (panel.log_y, axes.set_yscale, axes.yaxis)):
        if base is not None:
            scale("log", base=base)
            axis.set_major_formatter("{x:g}")  # their own are formulas, which the style does not read
            axis.set_minor_formatter(LogFormatter(base))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.across)
    axes.set_ylabel(panel.up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(which="both")
    axes.legend(fontsize="small")
