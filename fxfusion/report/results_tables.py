"""Rows of the tables on the page of results: numbers as text, with their intervals, and what tables are sorted by."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fxfusion.report.names import HUES, number, ranges
from fxfusion.report.results import (
    Entry,
    Interval,
    Layer,
    Matrix,
    PlanFacts,
    ProbeRow,
    QualityRow,
    Sample,
    SpeedRow,
    SweepPoint,
)

MIXERS = {
    "kept": "attention kept",
    "moved": "attention moved before the FFNs of its group",
    "dropped": "attention dropped",
    "none": "no attention",
}
_BETWEEN = {"none": "", "hoist": "goes first, one after another", "wide": "goes first, all reading one input"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A measured number in a table: `1.23`, `[1.20, 1.26]`, and the number that the table is sorted by.

    `room`: width of the longest interval in its column, in digits, so that the values stand below each other.
    """

    value: str
    interval: str = ""
    sort: float | None = None
    room: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a table of measures."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Measures by name."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """A group of the plan. `width` is empty where a layer's width is not known, `attention` where none lies between."""

    hue: int
    members: str
    count: int
    width: str
    attention: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """How much the layers of a group depend on each other; `where`: the pair that does most."""

    hue: int
    group: int
    mean: str
    largest: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Two continuations of a prompt, each cut where they part."""

    prompt: str
    common: str
    reference: str
    text: str
    agreeing: int | None


def numbers(layers: Sequence[int]) -> str:
    """`4-8, 10` for 4 5 6 7 8 10; `none` for none."""
    return ranges(sorted(set(layers)), ", ") or "none"


def cell(found: Interval | None, places: int, factor: float = 1.0) -> Cell:
    """A measure with so many decimal places, times `factor`; an interval that lacks one end is open there."""
    if found is None:
        return Cell("")
    if found.value is None:
        return Cell("not finite")
    low = "-∞" if found.low is None else f"{found.low * factor:,.{places}f}"
    high = "∞" if found.high is None else f"{found.high * factor:,.{places}f}"
    interval = "" if found.low is None and found.high is None else f"[{low}, {high}]"
    return Cell(f"{found.value * factor:,.{places}f}", interval, found.value)


def aligned(rows: Sequence[Sequence[Cell]]) -> list[tuple[Cell, ...]]:
    """The same cells, with the room that the intervals of each column need."""
    rooms = [max(_digits_wide(found.interval) for found in column) for column in zip(*rows, strict=True)]
    return [tuple(replace(found, room=room) for found, room in zip(row, rooms, strict=True)) for row in rows]


def _digits_wide(text: str) -> float:
    """About how wide a text is: points, commas and brackets take half the room of a digit."""
    return sum(1.0 if letter.isdigit() else 0.5 for letter in text)


def layer_title(layer: Layer) -> str:
    """All that is known of a layer, in lines."""
    lines = [f"layer {layer.number}", MIXERS[layer.mixer]]
    if layer.score is not None:
        score = cell(layer.score, 4)
        lines.append(f"attention score {score.value} {score.interval}".rstrip())
    lines.append(f"FFN of width {layer.width:,}" if layer.width else "no FFN")
    lines += [f"fused, group {layer.group}"] if layer.group is not None else []
    lines += [f"cos(X, f(X)) {layer.cosine:.4f}"] if layer.cosine is not None else []
    lines += [f"‖h‖ / ‖X‖ {layer.ratio:.4f}"] if layer.ratio is not None else []
    return "\n".join(lines)


def layer_cells(layers: Sequence[Layer]) -> list[tuple[Cell, ...]]:
    """FFN width, attention score, cos(X, f(X)), ‖h‖ / ‖X‖ of each layer."""
    return aligned([_layer_cells(layer) for layer in layers])


def _layer_cells(layer: Layer) -> list[Cell]:
    width = Cell(f"{layer.width:,}" if layer.width else "none", sort=layer.width)
    exact = [cell(Interval(value), 4) if value is not None else Cell("") for value in (layer.cosine, layer.ratio)]
    return [width, cell(layer.score, 4), *exact]


def plan_groups(plan: PlanFacts, layers: Sequence[Layer]) -> list[GroupRow]:
    """One row for each group of the plan."""
    widths: dict[int | str, int] = {layer.number: layer.width for layer in layers}
    rows = []
    for index, group in enumerate(plan.groups):
        known = [widths.get(member, 0) for member in group]
        places = [member for member in group if isinstance(member, int)]
        members = numbers(places) if len(places) == len(group) else ", ".join(map(str, group))
        width = f"{sum(known):,}" if all(known) else ""
        attention = _BETWEEN[plan.mixers[index]] if plan.mixers else ""
        rows.append(GroupRow(hue=index % HUES, members=members, count=len(group), width=width, attention=attention))
    return rows


def inside_groups(matrix: Matrix, plan: PlanFacts | None) -> list[Inside]:
    """One row for each group of the plan that has two layers of the matrix."""
    rows = []
    for index, group in enumerate(plan.groups if plan else ()):
        cells = [at for at, layer in enumerate(matrix.layers) if layer in group]
        pairs = [(matrix.values[row][column], row, column) for row in cells for column in cells if column > row]
        found = [(value, row, column) for value, row, column in pairs if value is not None]
        if not pairs:
            continue
        largest, row, column = max(found, default=(0.0, 0, 0))
        rows.append(
            Inside(
                hue=index % HUES,
                group=index,
                mean=number(sum(value for value, _, _ in found) / len(found)) if found else "",
                largest=number(largest) if found else "not measured",
                where=f"{matrix.layers[row]} → {matrix.layers[column]}" if found else "",
            )
        )
    return rows


def unmeasured(matrix: Matrix) -> str:
    """Layers with a value above the diagonal that is not measured; "" where there are none."""
    layers = [layer for at, layer in enumerate(matrix.layers) if None in matrix.values[at][at + 1 :]]
    return numbers(layers) if layers else ""


def quality(found: Sequence[QualityRow]) -> Table:
    """Those measures that any row has."""
    measures = (
        ("loss", 3, 1.0, [row.loss for row in found]),
        ("perplexity", 2, 1.0, [row.perplexity for row in found]),
        ("loss increase", 4, 1.0, [row.loss_increase for row in found]),
        ("KL", 4, 1.0, [row.kl for row in found]),
        ("top 1 agrees, %", 1, 100.0, [row.top1 for row in found]),
        ("top 5 agrees, %", 1, 100.0, [row.top5 for row in found]),
    )
    known = [measure for measure in measures if any(measure[3])]
    cells = [[cell(column[at], places, factor) for _, places, factor, column in known] for at in range(len(found))]
    return Table(heads=tuple(head for head, *_ in known), rows=_named([row.name for row in found], cells))


def _named(names: Sequence[str], cells: Sequence[Sequence[Cell]]) -> tuple[Row, ...]:
    return tuple(Row(name=name, cells=row) for name, row in zip(names, aligned(cells), strict=True))


def probes(found: Sequence[ProbeRow]) -> Table:
    """In percent, a column for each kind."""
    kinds = tuple(kind for kind, _ in found[0].solved)
    cells = [[_part(dict(row.solved).get(kind)) for kind in kinds] for row in found]
    return Table(heads=tuple(f"{kind}, %" for kind in kinds), rows=_named([row.name for row in found], cells))


def comparison(found: Sequence[Entry]) -> Table:
    """Those columns that any entry has. Entries that could not be had are not among the rows."""
    shown = [entry for entry in found if not entry.problem]
    columns = (
        ("FFN depth", [_plain(entry.ffns) for entry in shown]),
        ("predicted ms", [_plain(entry.latency_ms) for entry in shown]),
        ("KL", [cell(entry.kl, 4) for entry in shown]),
        ("loss increase", [cell(entry.loss_increase, 4) for entry in shown]),
        ("perplexity", [cell(entry.perplexity, 2) for entry in shown]),
        ("top 1 agrees, %", [cell(entry.top1, 1, 100.0) for entry in shown]),
        ("text agrees, %", [_part(entry.agreement) for entry in shown]),
        ("probes, %", [_part(entry.probes) for entry in shown]),
    )
    return _known([entry.name for entry in shown], columns)


def _plain(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(number(value), sort=value)


def _part(share: float | None) -> Cell:
    """In percent."""
    return Cell("") if share is None else Cell(f"{100 * share:.0f}", sort=share)


def _known(names: Sequence[str], columns: Iterable[tuple[str, Sequence[Cell]]]) -> Table:
    """Without the columns that say nothing of any row."""
    known = [(head, cells) for head, cells in columns if any(one.value for one in cells)]
    rows = list(zip(*(cells for _, cells in known), strict=True))
    return Table(heads=tuple(head for head, _ in known), rows=_named(names, rows))


def speed(found: Sequence[SpeedRow]) -> Table:
    """Ratio and control of each row."""
    rows = _named([row.name for row in found], [[cell(row.ratio, 3), cell(row.control, 3)] for row in found])
    return Table(heads=("times faster", "control"), rows=rows)


def sweep(found: Sequence[SweepPoint]) -> Table:
    """Those columns that any plan has."""
    columns = (
        ("depth", [Cell(str(point.depth), sort=point.depth) for point in found]),
        ("perplexity", [cell(point.perplexity, 2) for point in found]),
        ("loss", [cell(point.loss, 3) for point in found]),
        ("attention dropped", [Cell(str(point.dropped), sort=point.dropped) for point in found]),
        ("fused MiB", [_mebibytes(point.fused_bytes) for point in found]),
    )
    return _known([point.label for point in found], columns)


def _mebibytes(size: int | None) -> Cell:
    return Cell("") if size is None else Cell(f"{size / 2**20:,.1f}", sort=size)


def row_title(row: Row, heads: Sequence[str]) -> str:
    """A row in lines, such as `perplexity 23.10 [22.45, 23.77]`."""
    known = [(head, found) for head, found in zip(heads, row.cells, strict=True) if found.value]
    return "\n".join([row.name, *(f"{head} {found.value} {found.interval}".rstrip() for head, found in known)])


def texts(sample: Sample) -> Texts:
    """The texts of a sample, cut after the last letter that they share."""
    common = os.path.commonprefix([sample.reference, sample.text])
    return Texts(
        prompt=sample.prompt,
        common=common,
        reference=sample.reference[len(common) :],
        text=sample.text[len(common) :],
        agreeing=sample.agreeing,
    )
