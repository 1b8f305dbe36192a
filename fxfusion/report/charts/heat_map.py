"""The dependency matrix as a picture: row = removed block, column = measured block, on a logarithmic scale.

Source: arXiv 2503.18908, figure 3 (scale from 2^-9 to 2^-1). The colours are those of "viridis": their lightness rises
evenly, so that they read without colour vision too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxfusion.report.charts.figure import Chart, ink, inline, layer_ticks, new_figure, style
from fxfusion.report.results import Matrix, PlanFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST, HIGHEST = 2.0**-9, 2.0**-1
NOUNS = {"ffn": "FFN", "block": "layer"}

_COLOURS = "viridis"
_MARK = "#d6409f"  # of layers without attention: not among those colours
_CELL, _LEAST, _MOST = 34, 280, 540  # pixels: of a cell, and of the side of all cells
_LEFT, _BOTTOM, _GAP, _SCALE, _RIGHT = 52, 44, 16, 18, 108  # pixels beside the cells


def heat_map(matrix: Matrix, plan: PlanFacts | None) -> Chart:
    """The chart of the page, with the groups of the plan outlined."""
    dropped = matrix.dropped or (plan.dropped_attention if plan else ())
    with style():
        figure = draw(matrix, plan.groups if plan else (), dropped)
        title = f"How much each {NOUNS[matrix.unit]} depends on each earlier one"
        return inline(figure, "heat", title, "The table below holds the same values.", over=figure.axes[:1])


def draw(
    matrix: Matrix, groups: Sequence[Sequence[int | str]] = (), dropped: Sequence[int] = (), title: str = ""
) -> Figure:
    """Values beyond the scale take the colour of its end; what is not measured, or zero by definition, is left blank.

    `dropped`: layers without attention, marked on the diagonal.
    """
    count = len(matrix.layers)
    side = min(_MOST, max(_LEAST, _CELL * count))
    width, height = _LEFT + side + _GAP + _SCALE + _RIGHT, _BOTTOM + side + (36 if title else 10)
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, side / width, side / height))
    axes.set_facecolor(ink("line"))
    marked = [at for at, layer in enumerate(matrix.layers) if layer in dropped]
    axes.imshow(_cells(matrix, marked), interpolation="none")
    for axis in (axes.xaxis, axes.yaxis):
        layer_ticks(axis, matrix.layers)
    noun = NOUNS[matrix.unit]
    axes.set_xlabel(f"{noun} whose contribution is measured{'' if noun == 'layer' else ' (layer)'}")
    axes.set_ylabel(f"{noun} that is removed{'' if noun == 'layer' else ' (layer)'}")
    axes.set_title(title, color=ink("text"))
    _outline(axes, matrix, groups)
    left = _LEFT + side + _GAP
    _scale(figure.add_axes((left / width, _BOTTOM / height, _SCALE / width, side / height)))
    if marked:
        from matplotlib.patches import Patch

        axes.legend([Patch(color=_MARK)], ["layer without attention"], loc="lower left", facecolor=ink("card"))
    return figure


def _cells(matrix: Matrix, marked: Sequence[int]) -> Any:
    """`[layers, layers, 4]`: the colour of each cell."""
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, to_rgba

    values = numpy.array(matrix.values, dtype=float)  # None is not a number
    shown = numpy.isfinite(values) & ((values != 0) | numpy.triu(numpy.ones_like(values, dtype=bool), 1))
    # A distance of exactly zero has no logarithm: it is as independent as can be.
    scaled = LogNorm(LOWEST, HIGHEST, clip=True)(numpy.where(shown, values, LOWEST).clip(min=LOWEST))
    colours = colormaps[_COLOURS](scaled)
    colours[~shown] = 0.0
    colours[marked, marked] = to_rgba(_MARK)
    return colours


def _outline(axes: Any, matrix: Matrix, groups: Sequence[Sequence[int | str]]) -> None:
    """A square around each group that is named by layer numbers, white with a dark rim to be seen on every colour."""
    from matplotlib.patches import Rectangle

    for group in groups:
        cells = [at for at, layer in enumerate(matrix.layers) if layer in group]
        if len(cells) > 1:
            size = cells[-1] - cells[0] + 1
            for colour, width in (("#000000", 4.0), ("#fcfcfc", 1.8)):
                corner = (cells[0] - 0.5, cells[0] - 0.5)
                axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=colour, linewidth=width))


def _scale(axes: Any) -> None:
    """The colours from low to high."""
    import numpy
    from matplotlib import colormaps

    colours = colormaps[_COLOURS](numpy.linspace(0, 1, 128))[:, None]
    axes.imshow(colours, origin="lower", aspect="auto", extent=(0, 1, -9, -1), interpolation="none")
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    powers = range(-9, 0)
    labels = [f"{2.0**power:.2g}" for power in powers]
    axes.set_yticks(powers, labels=[f"{labels[0]} or less", *labels[1:-1], f"{labels[-1]} or more"])
    axes.set_ylabel("cosine distance (low: independent)")
