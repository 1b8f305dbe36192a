"""The dependency matrix as a picture in a file; how it is drawn: `fxfusion/report/charts/heat_map.py`."""

from __future__ import annotations

import os
from pathlib import Path

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.errors import OptionError
from fxfusion.files import replacing
from fxfusion.report.charts.figure import save, style
from fxfusion.report.charts.heat_map import NOUNS, draw
from fxfusion.report.results import Matrix

_SUFFIXES = (".png", ".svg")


def heat_map(
    matrix: DependencyMatrix, path: str | os.PathLike[str], *, title: str | None = None, overwrite: bool = False
) -> Path:
    """Draw the matrix into a .png or .svg file; returns its path. The same matrix gives the same file.

    Layers without attention are marked on the diagonal. What lies on or below it is grey. Values
    beyond the scale take the colour of its end. Raises `OptionError` for another suffix, or where the file
    cannot be written: an old file then stays, as one does that is no heat map of ours, unless with `overwrite`.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise OptionError(f"a heat map is a {' or '.join(_SUFFIXES)} file, got {target.name!r}")
    found = for_page(matrix)
    words = title if title is not None else f"How much each {NOUNS[matrix.unit]} depends on each earlier one"
    with style(), replacing(target, "heat map", overwrite=overwrite) as scratch:
        save(draw(found, dropped=found.dropped, title=words), scratch, target.suffix)
    return target


def for_page(matrix: DependencyMatrix) -> Matrix:
    """The matrix as pages show it. What stands on and below the diagonal was not measured."""
    rows = tuple(
        tuple(value if column > row else None for column, value in enumerate(line))
        for row, line in enumerate(matrix.values.tolist())
    )
    without = tuple(layer for layer in matrix.layers if layer not in matrix.attention)
    return Matrix(layers=tuple(matrix.layers), values=rows, unit=matrix.unit, dropped=without)
