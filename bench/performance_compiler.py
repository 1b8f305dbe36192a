"""Sections of docs/performance.md: what the compiler itself takes."""

from __future__ import annotations

from collections.abc import Sequence

from bench.performance_plots import growth
from bench.performance_words import left_out, median_of, where
from bench.record import Measurement, Record
from bench.tables import bytes_, table, times


def scale() -> str:
    record = Record.read("scale")
    whole = [one for one in record.measurements if one.place["what"] == "whole"]
    steps = ("capture", "fxfusion", "plan", "dry-run export", "all")
    rows = [
        (one.place["model"], one.facts["nodes"], one.facts["nodes_after"], *(median_of(one, name) for name in steps))
        + (bytes_(float(one.facts["peak_bytes"] or 0)),)
        for one in whole
    ]
    return f"""
## The compiler itself

{where(record)} {left_out(record)}

Models without weights, each in a process of its own, on one thread: captured by Dynamo, matched, planned and rewritten
(*fxfusion*), and written dry in the nemotron-nas layout. The goal was 60 s and 4 GB for each.

{table(rows, ["model", "nodes", "nodes after", *steps, "peak memory"], markdown=True)}

{growth_part(growth(record))}

{compile_part([one for one in record.measurements if one.place["what"] == "compile"])}
"""


def growth_part(grown: Sequence[Measurement]) -> str:
    if len(grown) < 2:
        return "How time grows with the layers was not measured."
    rows = [
        (one.place["layers"], one.facts["nodes"], median_of(one, "capture"), median_of(one, "fxfusion"))
        + (f"{one.medians['fxfusion'].value / float(one.facts['nodes'] or 1) * 1e6:.0f} us",)
        + (bytes_(float(one.facts["peak_bytes"] or 0)),)
        for one in grown
    ]
    first, last = grown[0], grown[-1]
    layers = float(last.place["layers"] or 0) / float(first.place["layers"] or 1)
    ours, captured = (last.medians[name].value / first.medians[name].value for name in ("fxfusion", "capture"))
    return f"""
With the layers (five of each eight without attention), {layers:.0f} times as many layers take {captured:.1f} times the
capture and {ours:.1f} times fxfusion's own time:

{table(rows, ["layers", "nodes", "capture", "fxfusion", "per node", "peak memory"], markdown=True)}

![growth with the layers](figures/scale.svg)
""".strip()


def compile_part(compiled: Sequence[Measurement]) -> str:
    return "\n\n".join(
        f"Inductor compiles a decoder of {one.place['layers']} layers in {median_of(one, 'fused')} fused and "
        f"{median_of(one, 'unfused')} unfused: {times(one.ratios['unfused/fused'])} as fast."
        for one in compiled
    )


def memory() -> str:
    record = Record.read("memory")
    rows = [
        (one.place["route"], bytes_(float(one.facts["model_bytes"] or 0)), bytes_(float(one.facts["group_bytes"] or 0)))
        + tuple(
            bytes_(one.medians[name].value) if name in one.medians else None for name in ("peak", "after", "recompiled")
        )
        for one in record.measurements
    ]
    return f"""
## Memory

{where(record)}

What is resident beyond the model, in a process of its own. The backend keeps the members, as the module still holds
them, and adds one packed copy of the fused groups' weights, however many graphs are compiled. `fuse` frees the members
group by group, so that it never holds more than one group twice.

{table(rows, ["route", "model", "fused groups", "peak more", "after", "after two recompiles"], markdown=True)}
"""


def guard() -> str:
    record = Record.read("check")
    rows = [
        (name, f"{value:g}" if isinstance(value, float) else value) for name, value in record.results["counts"].items()
    ]
    return f"""
## Regression guard

`python -m bench.check`, which the tests run too, compares counts that do not depend on the machine with these:

{table(rows, ["on a decoder of 8 layers (kernels: of 4)", "count"], markdown=True)}
"""
