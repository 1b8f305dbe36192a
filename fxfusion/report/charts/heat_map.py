"""The dependency matrix as coloured cells: SVG paths in cells, so that 126 x 126 of them stay small.

Source: figure 3 of the paper (log scale from 2^-9 to 2^-1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxfusion.report.charts.scale import Tick, layer_ticks, runs
from fxfusion.report.html import HUES
from fxfusion.report.results import Matrix, PlanFacts

_LOWEST, _HIGHEST = -9, -1  # powers of two at the ends of the colour scale
_STEPS = 4  # colours per power of two
# The colour map "viridis" at each power of two: its lightness rises evenly, so it reads without colour vision too.
_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A group on the heat map: a square on the diagonal, in cells. `largest`: pair of layers and value."""

    group: int
    hue: int
    first: int
    size: int
    largest: tuple[int, int, float] | None
    mean: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """`fills`: colour and path of its cells. `strips`: layers without attention, as first cell and number of cells."""

    layers: tuple[int, ...]
    fills: tuple[tuple[str, str], ...]
    ticks: tuple[Tick, ...]
    outlines: tuple[Outline, ...]
    strips: tuple[tuple[int, int], ...]
    missing: tuple[int, ...]
    rows: list[list[float | None]]


def heat_map(matrix: Matrix, plan: PlanFacts | None) -> HeatMap:
    """The matrix as coloured cells. What is zero on and below the diagonal is left blank, as what is not measured."""
    place = {layer: index for index, layer in enumerate(matrix.layers)}
    dropped = matrix.dropped or (plan.dropped_attention if plan else ())
    groups = plan.groups if plan else ()
    outlines = [_outline(matrix, place, index, group) for index, group in enumerate(groups)]
    return HeatMap(
        layers=matrix.layers,
        fills=tuple((colour(step), path) for step, path in _fills(matrix)),
        ticks=layer_ticks(matrix.layers),
        outlines=tuple(outline for outline in outlines if outline is not None),
        strips=tuple(runs(place[layer] for layer in dropped if layer in place)),
        missing=tuple(matrix.layers[at] for at, row in enumerate(matrix.values) if None in row[at + 1 :]),
        rows=[[value if value is None else float(f"{value:.4g}") for value in row] for row in matrix.values],
    )


def measured(matrix: Matrix) -> Iterator[tuple[int, int, float]]:
    """Row, column and value of the cells that say something."""
    for row, values in enumerate(matrix.values):
        for column, value in enumerate(values):
            if value is not None and (column > row or value):
                yield row, column, value


def colour_step(value: float) -> int:
    """The step of the colour scale, from 0 for 2^-9 and less to the last for 2^-1 and more."""
    power = math.log2(value) if value > 0 else -math.inf
    return round(_STEPS * (min(_HIGHEST, max(_LOWEST, power)) - _LOWEST))


def colour(step: int) -> str:
    """`#rrggbb` of a step, between the two colours it lies between."""
    index, part = divmod(step, _STEPS)
    ends = [_VIRIDIS[index], _VIRIDIS[min(index + 1, len(_VIRIDIS) - 1)]]
    low, high = ([int(end[at : at + 2], 16) for at in (0, 2, 4)] for end in ends)
    return "#" + "".join(f"{round(a + (b - a) * part / _STEPS):02x}" for a, b in zip(low, high, strict=True))


def colour_scale() -> tuple[list[str], list[Tick]]:
    """Colours from low to high, and each power of two at its place among them."""
    steps = _STEPS * (_HIGHEST - _LOWEST)
    ticks = [Tick(100.0 * _STEPS * index / steps, str(_LOWEST + index)) for index in range(_HIGHEST - _LOWEST + 1)]
    return [colour(step) for step in range(steps + 1)], ticks


def _fills(matrix: Matrix) -> list[tuple[int, str]]:
    """Step and path, one path for all cells of a step: neighbours in a row share one rectangle."""
    cells: dict[tuple[int, int], list[int]] = {}
    for row, column, value in measured(matrix):
        cells.setdefault((colour_step(value), row), []).append(column)
    paths: dict[int, list[str]] = {}
    for (step, row), columns in cells.items():
        paths.setdefault(step, []).extend(f"M{first} {row}h{size}v1h-{size}z" for first, size in runs(columns))
    return [(step, "".join(paths[step])) for step in sorted(paths)]


def _outline(matrix: Matrix, place: dict[int, int], index: int, group: Sequence[int | str]) -> Outline | None:
    cells = [place[member] for member in group if isinstance(member, int) and member in place]
    if len(cells) < 2:  # named by module paths, or not in the matrix
        return None
    inside = [found for found in measured(matrix) if found[0] in cells and found[1] in cells]
    largest = max(inside, key=lambda found: found[2], default=None)
    return Outline(
        group=index,
        hue=index % HUES,
        first=min(cells),
        size=max(cells) - min(cells) + 1,
        largest=largest and (matrix.layers[largest[0]], matrix.layers[largest[1]], largest[2]),
        mean=sum(value for _, _, value in inside) / len(inside) if inside else None,
    )
