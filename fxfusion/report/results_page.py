"""The results of all commands as one HTML page, of rows that the template `results.html.j2` draws.

The page is one file of at most 2 MB that asks for nothing else. It can be read without JavaScript; a little of it
shows what a pointer or the keys are on, and sorts tables.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxfusion.errors import FxFusionError
from fxfusion.files import replacing
from fxfusion.report import results_tables as tables
from fxfusion.report.charts import comparison
from fxfusion.report.charts.figure import Chart
from fxfusion.report.charts.heat_map import heat_map
from fxfusion.report.charts.layer_map import map_of_layers
from fxfusion.report.charts.measures import measures, panels
from fxfusion.report.html import environment, graph_rows
from fxfusion.report.names import number
from fxfusion.report.results import Contest, Matrix, PlanFacts, QualityRow, Results

MAX_BYTES = 2_000_000

# Parts of the results, what the page calls them, and the command that makes them.
_PARTS = (
    ("layers", "layer map", "fxfusion score"),
    ("matrix", "dependency between layers", "fxfusion matrix"),
    ("plan", "plan", "fxfusion plan"),
    ("quality", "quality", "fxfusion eval"),
    ("probes", "generative probes", "fxfusion eval --probes 16"),
    ("samples", "generated text", "fxfusion eval --generate 4"),
    ("speed", "speed", "fxfusion eval --speed"),
    ("sweep", "sweep of plans", "fxfusion sweep"),
    ("comparison", "comparison with other methods", "fxfusion compare"),
    ("report", "what the compiler found, and what it refused", "fxfusion plan"),
)
_UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1.0, ""))


def write_results_page(
    results: Results, path: str | os.PathLike[str], title: str = "fxfusion results", *, overwrite: bool = False
) -> Path:
    """Write the page (UTF-8, at most 2 MB, no outside assets) and return its path.

    The file is complete or, where that fails, what it was before. Raises `FxFusionError` where it cannot be written,
    where a file that is no such page of ours is there (unless with `overwrite`), or the results do not fit 2 MB.
    """
    text = render(results, title)
    with replacing(path, "results page", overwrite=overwrite) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(path)


def render(results: Results, title: str = "fxfusion results") -> str:
    """The page as text. Above 2 MB it does without the matrix as a table, then without the compiler's report."""
    page = environment()
    page.globals |= {"number": number, "numbers": tables.numbers}
    template, parts = page.get_template("results.html.j2"), _parts(results)
    shortened: list[str] = []
    for left_out in ("", "the values of the matrix as a table", "what the compiler found"):
        if left_out:
            shortened.append(left_out)
            parts["notes"] = [*results.notes, f"Left out, to keep the page below 2 MB: {', '.join(shortened)}."]
        if len(shortened) == 2:
            parts |= {"graphs": [], "empty": 0}
        text = template.render(parts, title=title, value_table=not shortened)
        if len(text.encode()) <= MAX_BYTES:
            return text
    raise FxFusionError(
        f"the page would take {len(text.encode()):,} bytes, at most {MAX_BYTES:,} are allowed:"
        " give it fewer samples, sweep points or notes"
    )


def _parts(results: Results) -> dict[str, Any]:
    """What the template shows."""
    matrix = results.matrix if results.matrix and results.matrix.layers else None
    graphs, empty = graph_rows(results.report) if results.report else ([], 0)
    sweep = tables.sweep(results.sweep)
    return dict(
        facts=_facts(results),
        tiles=_tiles(results),
        notes=results.notes,
        map=map_of_layers(results.layers, results.score_method) if results.layers else None,
        layers=list(zip(results.layers, tables.layer_cells(results.layers), strict=True)),
        matrix=matrix,
        heat=heat_map(matrix, results.plan) if matrix else None,
        values=_values(matrix) if matrix else [],
        inside=tables.inside_groups(matrix, results.plan) if matrix else [],
        unmeasured=tables.unmeasured(matrix) if matrix else "",
        plan=results.plan,
        plan_groups=tables.plan_groups(results.plan, results.layers) if results.plan else [],
        quality=tables.quality(results.quality) if results.quality else None,
        quality_chart=_quality_chart(results.quality),
        probes=tables.probes(results.probes) if results.probes else None,
        speed=tables.speed(results.speed) if results.speed else None,
        speed_chart=measures("speed", "times faster", [(row.name, row.ratio) for row in results.speed], 1.0),
        sweep=sweep if results.sweep else None,
        front=[point.front for point in results.sweep],
        panels=panels(results.sweep, [tables.row_title(row, sweep.heads) for row in sweep.rows]),
        **_comparison(results.comparison),
        samples=[tables.texts(sample) for sample in results.samples],
        graphs=graphs,
        empty=empty,
        missing=_missing(results),
    )


def _values(matrix: Matrix) -> list[list[float | None]]:
    """To four digits."""
    return [[value if value is None else float(f"{value:.4g}") for value in row] for row in matrix.values]


def _quality_chart(rows: Sequence[QualityRow]) -> Chart | None:
    """The increase of the loss, paired by token: marginal intervals of two losses overlap where it is far from zero.
    Without it, the loss or the perplexity."""
    return (
        measures("quality", "loss increase (nats per token)", [(row.name, row.loss_increase) for row in rows], 0.0)
        or measures("quality", "loss (nats per token)", [(row.name, row.loss) for row in rows])
        or measures("quality", "perplexity", [(row.name, row.perplexity) for row in rows])
    )


def _comparison(found: Contest | None) -> dict[str, Any]:
    """The table, which of its rows are best or could not be had, and the chart."""
    if found is None:
        return {"comparison": None}
    cells = [
        (one.method, one.refitted, one.ffns, one.latency_ms, None if one.kl is None else one.kl.value)
        for one in found.entries
    ]
    return dict(
        contest=found,
        comparison=tables.comparison(found.entries),
        entries=[entry for entry in found.entries if not entry.problem],
        problems=[entry for entry in found.entries if entry.problem],
        comparison_chart=comparison.for_page(comparison.curves_of(cells), found.predicted_for),
    )


def _facts(results: Results) -> str:
    """The model in one line."""
    model = results.model
    if model is None:
        return ""
    sizes = [
        f"{model.layers:,} layers" if model.layers else "",
        f"hidden {model.hidden:,}" if model.hidden else "",
        f"vocabulary {model.vocabulary:,}" if model.vocabulary else "",
    ]
    found = [model.name, model.architecture, *sizes]
    return " · ".join(filter(None, found))


def _tiles(results: Results) -> list[tuple[str, str]]:
    """The key figures, as value and caption."""
    tiles: list[tuple[str, str]] = []
    if results.model and results.model.parameters:
        count = results.model.parameters
        size, unit = next((size, unit) for size, unit in _UNITS if count >= size)
        tiles.append((f"{number(count / size)}{unit}", "parameters"))
    if results.plan:
        tiles += _plan_tiles(results, results.plan)
    ends = [row for row in (results.quality[:1] + results.quality[1:][-1:]) if row.perplexity]
    if ends:
        values = " → ".join(tables.cell(row.perplexity, 2).value for row in ends)
        tiles.append((values, f"perplexity: {' → '.join(row.name for row in ends)}"))
    if results.speed:
        tiles.append((f"{tables.cell(results.speed[0].ratio, 2).value}x", f"as fast: {results.speed[0].name}"))
    return tiles


def _plan_tiles(results: Results, plan: PlanFacts) -> list[tuple[str, str]]:
    had = sum(layer.mixer != "none" for layer in results.layers)
    fused = sum(len(group) for group in plan.groups)
    tiles = [
        (f"{len(plan.dropped_attention)}{f' of {had}' if had else ''}", "attention layers dropped"),
        (f"{fused} → {len(plan.groups)}" if fused else "0", "FFNs fused into wide ones"),
    ]
    if plan.removed:
        tiles.append((f"{len(plan.removed)}", f"layers removed as a whole: {', '.join(map(str, plan.removed))}"))
    if results.layers:
        before = had + sum(bool(layer.width) for layer in results.layers)
        gone = sum(
            (layer.mixer != "none") + bool(layer.width) for layer in results.layers if layer.number in plan.removed
        )
        after = before - len(plan.dropped_attention) - gone - fused + len(plan.groups)
        tiles.append((f"{before} → {after}", "residual blocks"))
    return tiles


def _missing(results: Results) -> list[tuple[str, str]]:
    """What is not on the page, and the command that makes it."""
    found = [(what, command) for name, what, command in _PARTS if not getattr(results, name)]
    if results.layers and not any(layer.score for layer in results.layers):
        found.insert(0, ("attention scores", "fxfusion score"))
    return found
