"""The dependency matrix as a picture: row = removed block, column = measured block, colours as in the paper.

Source: arXiv 2503.18908, figure 3: a logarithmic scale from 2^-9 (blue: independent) to 2^-1 (red).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.errors import OptionError
from fxfusion.files import replacing

LOWEST, HIGHEST = 2.0**-9, 2.0**-1

_SUFFIXES = (".png", ".svg")
_NOUNS = {"ffn": "FFN", "block": "block"}
_LABELS_ON_AXIS = 26  # more layer numbers than this cannot be read
_UNMEASURED = "#f0f0f0"
_MARK = "#7a4fa3"


def heat_map(
    matrix: DependencyMatrix, path: str | os.PathLike[str], *, title: str | None = None, overwrite: bool = False
) -> Path:
    """Draw the matrix into a .png or .svg file; returns its path.

    Layers without attention get a violet square on the diagonal. What lies on or below it is grey. Values
    beyond the scale take the colour of its end. Raises `OptionError` for another suffix, or where the file
    cannot be written: an old file then stays, as one does that is no heat map of ours, unless with `overwrite`.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise OptionError(f"a heat map is a {' or '.join(_SUFFIXES)} file, got {target.name!r}")
    from matplotlib import rc_context

    # A fixed salt and no date: the same matrix gives the same file.
    with rc_context({"svg.hashsalt": "fxfusion", "font.family": "DejaVu Sans"}):
        figure = _draw(matrix, title)
        dated = {"Date": None} if target.suffix.lower() == ".svg" else {}
        with replacing(target, "heat map", overwrite=overwrite) as scratch:
            figure.savefig(scratch, format=target.suffix[1:].lower(), metadata=dated)
    return target


def _draw(matrix: DependencyMatrix, title: str | None) -> Any:
    from matplotlib.figure import Figure

    count = len(matrix.layers)
    side = min(12.0, max(5.0, 0.32 * count + 2.0))
    text = 9.0 + (side - 5.0) / 2  # larger pictures are shown smaller
    figure = Figure(figsize=(side + 1.2, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = _cells(axes, matrix)
    _name_axes(axes, matrix, text)
    if count <= _LABELS_ON_AXIS:
        _grid(axes, count)
    _mark_attention_free(axes, matrix, text)
    words = title if title is not None else f"How much each {_NOUNS[matrix.unit]} depends on each earlier one"
    axes.set_title(words, fontsize=text + 2)
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.8, pad=0.02)
    bar.set_ticks([2.0**power for power in range(-9, 0)], labels=[f"$2^{{{power}}}$" for power in range(-9, 0)])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=text)
    bar.set_label("cosine distance (low: independent)", fontsize=text)
    return figure


def _cells(axes: Any, matrix: DependencyMatrix) -> Any:
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = matrix.values.double().numpy()
    hidden = numpy.tril(numpy.ones_like(values, dtype=bool))
    colours = colormaps["RdYlBu_r"].with_extremes(bad=_UNMEASURED)
    # A distance of exactly zero has no logarithm: it is as independent as can be.
    shown = numpy.ma.masked_array(values.clip(min=LOWEST / 2), mask=hidden)
    return axes.imshow(shown, cmap=colours, norm=LogNorm(LOWEST, HIGHEST), interpolation="nearest")


def _name_axes(axes: Any, matrix: DependencyMatrix, text: float) -> None:
    count = len(matrix.layers)
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100) if count <= step * _LABELS_ON_AXIS)
    places = range(0, count, step)
    labels = [str(matrix.layers[place]) for place in places]
    axes.set_xticks(places, labels=labels, fontsize=text)
    axes.set_yticks(places, labels=labels, fontsize=text)
    axes.tick_params(length=2)
    noun = _NOUNS[matrix.unit]
    axes.set_xlabel(f"{noun} whose contribution is measured (layer)", fontsize=text)
    axes.set_ylabel(f"{noun} that is removed (layer)", fontsize=text)


def _grid(axes: Any, count: int) -> None:
    for place in range(1, count):
        axes.axhline(place - 0.5, color="white", linewidth=0.6)
        axes.axvline(place - 0.5, color="white", linewidth=0.6)


def _mark_attention_free(axes: Any, matrix: DependencyMatrix, text: float) -> None:
    """A square on the diagonal for each layer without attention, and a legend, if there are any."""
    from matplotlib.lines import Line2D

    places = [place for place, layer in enumerate(matrix.layers) if layer not in matrix.attention]
    if not places:
        return
    size = max(1.5, min(7.0, 200 / len(matrix.layers)))
    axes.plot(places, places, "s", color=_MARK, markersize=size)
    sample = Line2D([], [], color=_MARK, marker="s", linestyle="none", markersize=7)
    axes.legend([sample], ["layer without attention"], loc="lower left", fontsize=text, framealpha=1.0)
