"""docs/performance.md and its figures, from bench/results/*.json alone, so that no number can drift; and
docs/gpu_predictions.md, from `fxfusion.cost`.

    python -m bench.performance_page

The text is bench/pages/performance.md.j2. A test compares the page with what this makes of the recorded files.
Sentences that judge are made from the numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu, show
from bench.record import RESULTS, Interval, Measurement, Record

NAMES = "chain_speed grouped_speed grid whole_models window_speed gpu scale memory check".split()
FORMS = ("unfused", "fused", "surgery")
LEAST = "{:.2f}x at least"
# Goals for chains: figure, goal, name in the file, how it is written.
GOALS = (
    ("over unfused, geometric mean", "1.20x", "geomean_over_unfused", "{:.2f}x"),
    ("over unfused, frozen", "1.35x", "geomean_over_unfused_frozen", "{:.2f}x"),
    ("over one hand-written wide FFN, geometric mean", "0.97x", "geomean_of_hand_written", "{:.2f}x"),
    ("cells whose interval lies below 0.97x of unfused", "0", "cells_below_0.97", "{:.0f}"),
    ("of a GEMV, 1 token, weights beyond the cache, float32", "0.90x", "least_of_limit_float32", LEAST),
    ("of a GEMV, 1 token, weights beyond the cache, bfloat16", "0.75x", "least_of_limit_bfloat16", LEAST),
)


def main() -> None:
    (show.DOCS / "performance.md").write_text(page(), "utf-8")
    (show.DOCS / "gpu_predictions.md").write_text(gpu.page(), "utf-8")
    print("written:", *(path.name for path in figures(show.DOCS / "figures")), "performance.md gpu_predictions.md")


def page(records: dict[str, Record] | None = None) -> str:
    """The whole text; what was not recorded says how it would be made. `records`: instead of the files."""
    if records is None:
        records = {name: Record.read(name) for name in NAMES if (RESULTS / f"{name}.json").exists()}
    return show.render("performance.md.j2", globals() | dict.fromkeys(NAMES) | records)


# --- what ran where, and gains ------------------------------------------------------------------------


def where(record: Record) -> str:
    """The line below a heading: what ran where."""
    machine, load = record.machine, record.machine.load_average
    parts = [machine.gpu or machine.processor or "processor not recorded", f"torch {record.versions.get('torch', '?')}"]
    parts += [f"threads {machine.threads}", record.date, f"`{record.command}`"]
    return ", ".join(parts) + (f", load {load[0]:.1f}" if load else "") + "."


def left_out(record: Record) -> str:
    """What is missing in a file, and why."""
    if record.complete:
        return ""
    if not record.left_out:
        return "It was stopped before its end, so parts are missing."
    return f"Left out for lack of time: {'; '.join(record.left_out)}."


def ratios(found: Sequence[Measurement]) -> str:
    """The table of all ratios."""
    names = dict.fromkeys(name for one in found for name in one.ratios)
    heads = [(name, "A/A" if "again" in name else name.replace("/", " / ").replace("_", " ")) for name in names]
    return show.ratio_table(found, heads, markdown=True)


def by_kinds(record: Record) -> str:
    return "\n\n".join(ratios(found) for found in show.by_kind(record.measurements).values() if found)


def gains(record: Record, ratio: str) -> list[Interval]:
    return [one.ratios[ratio] for one in record.measurements if ratio in one.ratios]


def gain(record: Record, ratio: str) -> str:
    return _mean(one.value for one in gains(record, ratio))


def judged(record: Record, ratio: str) -> str:
    """In how many cells it is faster and slower, by their intervals."""
    found = gains(record, ratio)
    better, worse = sum(one.low > 1 for one in found), sum(one.high < 1 for one in found)
    return f"faster in {better}, slower in {worse}, and neither in {len(found) - better - worse}"


def window_gains(record: Record) -> str:
    names = dict.fromkeys(name for one in record.measurements for name in one.ratios if "again" not in name)
    told = {
        name: f"{gain(record, name)} over {len(gains(record, name))} cases, {judged(record, name)}" for name in names
    }
    return "\n".join(f"* {name.replace('/', ' / ')}: {words}" for name, words in told.items())


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.geometric_mean(list(values)):.2f}x"


# --- tables: a heading, and what it shows of a measurement --------------------------------------------


def _of(name: str) -> Callable[[Any], Any]:
    """From its place, or from what else is known of it."""
    return lambda one: {**one.facts, **one.place}[name]


def _took(name: str) -> Callable[[Any], str | None]:
    return lambda one: show.seconds(one.medians[name].value) if name in one.medians else None


def _fact(name: str, shown: Callable[[Any], str] = show.bytes_) -> Callable[[Any], str]:
    return lambda one: shown(one.facts[name])


def _median_size(name: str) -> Callable[[Any], str | None]:
    return lambda one: show.bytes_(one.medians[name].value) if name in one.medians else None


def chain_goals(record: Record) -> str:
    """What was asked for, and what was measured."""
    found = record.results["summary"]
    rows = [(*row[:2], "not measured" if found[row[2]] is None else row[3].format(found[row[2]])) for row in GOALS]
    return show.table(rows, ("figure", "goal", "measured"), markdown=True)


def rates(record: Record) -> str:
    found = record.results["limits"]["operations_per_second"].items()
    return ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in found)


def shares(record: Record) -> str:
    found, names = record.measurements, [name for name in record.measurements[0].samples if "again" not in name]
    shown = {name: _fact(f"share of limit, {name}", "{:.0%}".format) for name in names}
    return show.columns(found, {**{name: _of(name) for name in found[0].place}, **shown})


def speeds(record: Record) -> str:
    """Of whole models."""
    heads = {name: _of(name) for name in record.measurements[0].place}
    heads |= {f"tokens/s, {name}": _fact(f"tokens_per_second, {name}", "{:.3g}".format) for name in FORMS}
    heads |= {f"first call, {name}": _fact(f"first call, {name}", show.seconds) for name in FORMS}
    return show.columns(
        record.measurements, heads | {f"memory more, {n}": _fact(f"peak bytes more, {n}") for n in FORMS}
    )


def compiles(record: Record) -> str:
    facts: list[Any] = [one.facts for one in record.measurements]
    return _mean(one["first call, unfused"] / one["first call, fused"] for one in facts)


def whole(record: Record) -> str:
    heads = {"model": _of("model"), "nodes": _of("nodes"), "nodes after": _of("nodes_after")}
    heads |= {name: _took(name) for name in ("capture", "fxfusion", "plan", "dry-run export", "all")}
    return show.columns(_what(record, "whole"), heads | {"peak memory": _fact("peak_bytes")})


def _what(record: Record, what: str) -> list[Any]:
    return [one for one in record.measurements if one.place["what"] == what]


def growth(record: Record) -> list[Any]:
    """The measurements of growth, by layers."""
    return sorted(_what(record, "growth"), key=_of("layers"))


def growth_table(grown: Sequence[Any]) -> str:
    heads = {"layers": _of("layers"), "nodes": _of("nodes"), "capture": _took("capture"), "fxfusion": _took("fxfusion")}
    heads["per node"] = lambda one: f"{one.medians['fxfusion'].value / one.facts['nodes'] * 1e6:.0f} us"
    return show.columns(grown, heads | {"peak memory": _fact("peak_bytes")})


def times_of(grown: Sequence[Any], name: str) -> float:
    """How many times as much the last one has, or takes, as the first."""
    first, last = (one.place[name] if name in one.place else one.medians[name].value for one in (grown[0], grown[-1]))
    return float(last / first)


def compiles_faster(record: Record) -> str:
    return "\n\n".join(
        f"Inductor compiles a decoder of {one.place['layers']} layers in {_took('fused')(one)} fused and "
        f"{_took('unfused')(one)} unfused: {show.times(one.ratios['unfused/fused'])} as fast."
        for one in _what(record, "compile")
    )


def memory_table(record: Record) -> str:
    heads = {"route": _of("route"), "model": _fact("model_bytes"), "fused groups": _fact("group_bytes")}
    later = {"peak more": "peak", "after": "after", "after two recompiles": "recompiled"}
    return show.columns(record.measurements, heads | {head: _median_size(name) for head, name in later.items()})


def counts(record: Record) -> str:
    found = record.results["counts"].items()
    rows = [(name, f"{count:g}" if isinstance(count, float) else count) for name, count in found]
    return show.table(rows, ["on a decoder of 8 layers (kernels: of 4)", "count"], markdown=True)


# --- figures ------------------------------------------------------------------------------------------


def figures(folder: Path) -> list[Path]:
    """All that can be drawn; returns their paths."""
    found = [_limit_figure(folder / "share_of_limit.svg")]
    grown = growth(Record.read("scale"))
    return [*found, _growth_figure(grown, folder / "scale.svg")] if len(grown) > 1 else found


def _growth_figure(grown: Sequence[Any], path: Path) -> Path:
    figure, axes = show.new_figure(x="layers", y="seconds", title="models without weights, one thread")
    for head, name in {"Dynamo's capture": "capture", "fxfusion: match, plan, rewrite": "fxfusion"}.items():
        show.draw_lines(axes, {head: [(one.place["layers"], one.medians[name]) for one in grown]})
    axes.legend()
    return show.save(figure, path)


def _limit_figure(path: Path) -> Path:
    found: list[Any] = [one for one in Record.read("grid").measurements if one.place["tokens"] == 1]
    title = "1 token, CPU, by reading the weights"
    figure, axes = show.new_figure(x="members of the chain", y="share of the limit", title=title)
    for dtype in dict.fromkeys(one.place["dtype"] for one in found):
        ours = sorted((one for one in found if one.place["dtype"] == dtype), key=_of("members"))
        for name in found[0].samples:
            if "again" not in name:
                show.draw_lines(axes, {f"{name}, {dtype}": [(one.place["members"], _share(one, name)) for one in ours]})
    axes.legend(fontsize="x-small")
    return show.save(figure, path)


def _share(one: Any, name: str) -> Interval:
    limit, found = one.facts["limit_seconds"], one.medians[name]
    return Interval(value=limit / found.value, low=limit / found.high, high=limit / found.low)


if __name__ == "__main__":
    main()
