"""What the sections of docs/performance.md share: what ran where, what is missing, headings."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from bench.record import Measurement, Record
from bench.tables import seconds


def where(record: Record) -> str:
    """The line below a heading: what ran where."""
    machine = record.machine
    parts = [machine.gpu or machine.processor or "processor not recorded", f"torch {record.versions.get('torch', '?')}"]
    parts += [f"threads {machine.threads}", record.date, f"`{record.command}`"]
    loads = machine.load_average
    return ", ".join(parts) + (f", load {loads[0]:.1f}" if loads else "") + "."


def left_out(record: Record) -> str:
    """What is missing in a file, and why."""
    if record.complete:
        return ""
    if not record.left_out:
        return "It was stopped before its end, so parts are missing."
    return f"Left out for lack of time: {'; '.join(record.left_out)}."


def columns(found: Iterable[Measurement]) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for one in found for name in one.ratios)
    return [(name, "A/A" if "again" in name else name.replace("/", " / ").replace("_", " ")) for name in names]


def gain(values: Iterable[float]) -> str:
    return f"{statistics.geometric_mean(list(values)):.2f}x"


def median_of(one: Measurement, name: str) -> str | None:
    return seconds(one.medians[name].value) if name in one.medians else None
