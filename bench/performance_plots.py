"""The figures of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.plots import draw_lines, new_figure, save
from bench.record import Measurement, Record
from bench.timing import Interval


def figures(folder: Path) -> list[Path]:
    """All that can be drawn; returns their paths."""
    found = [_limit_figure(folder / "share_of_limit.svg")]
    grown = growth(Record.read("scale"))
    return [*found, _growth_figure(grown, folder / "scale.svg")] if len(grown) > 1 else found


def _growth_figure(grown: Sequence[Measurement], path: Path) -> Path:
    figure, axes = new_figure(x="layers", y="seconds", title="models without weights, one thread")
    lines = {
        name: [(float(one.place["layers"] or 0), one.medians[key]) for one in grown]
        for name, key in (("Dynamo's capture", "capture"), ("fxfusion: match, plan, rewrite", "fxfusion"))
    }
    draw_lines(axes, lines)
    axes.legend()
    return save(figure, path)


def _limit_figure(path: Path) -> Path:
    found = [one for one in Record.read("grid").measurements if one.place["tokens"] == 1]
    figure, axes = new_figure(
        x="members of the chain", y="share of the limit", title="1 token, CPU, by reading the weights"
    )
    names: Sequence[str] = [name for name in found[0].samples if "again" not in name]
    for dtype in dict.fromkeys(one.place["dtype"] for one in found):
        ours = sorted((one for one in found if one.place["dtype"] == dtype), key=_members)
        draw_lines(axes, {f"{name}, {dtype}": [(_members(one), _share(one, name)) for one in ours] for name in names})
    axes.legend(fontsize="x-small")
    return save(figure, path)


def _share(one: Measurement, name: str) -> Interval:
    limit, found = float(one.facts["limit_seconds"] or 0), one.medians[name]
    return Interval(value=limit / found.value, low=limit / found.high, high=limit / found.low)


def _members(one: Measurement) -> float:
    return float(one.place["members"] or 0)


def growth(record: Record) -> list[Measurement]:
    """The measurements of growth, by layers."""
    found = [one for one in record.measurements if one.place["what"] == "growth"]
    return sorted(found, key=lambda one: float(one.place["layers"] or 0))
