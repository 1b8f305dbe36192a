"""Many plans at once: what each depth costs, as a Pareto front.

found = sweep(model, batches, drops=(2, 4, 6))
found.to_csv("sweep.csv"); found.plot("sweep.svg")
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fxfusion.analysis.batches import Batch
from fxfusion.analysis.scores import Method
from fxfusion.cost import Hardware, Workload
from fxfusion.errors import OptionError
from fxfusion.files import replacing
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import told
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Measured
from fxfusion.planning.choice import ANYTHING, Search
from fxfusion.planning.make_plan import search_for
from fxfusion.planning.price import predicted_latency
from fxfusion.planning.request import Request
from fxfusion.report.charts.figure import save, style
from fxfusion.report.charts.lines import Line, Panel, draw_panels
from fxfusion.report.plain import table

_KIND = "sweep"


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One measured plan. `on_front`: no other has as few FFNs at as little loss.

    `latency_ms`: predicted, where a device was named; `on_latency_front`: no other is as quick at as little loss.
    """

    measured: Measured
    on_front: bool = False
    latency_ms: float | None = None
    on_latency_front: bool = False

    def to_dict(self) -> dict[str, Any]:
        plan, quality = self.measured.plan, self.measured.quality
        return {
            "depth": self.measured.depth,
            "dropped_attention": list(plan.dropped_attention),
            "groups": [group.to_data() for group in plan.groups],
            "norm": plan.norm,
            **({"removed": list(plan.removed)} if plan.removed else {}),
            "fused_bytes": self.measured.fused_bytes,
            "on_front": self.on_front,
            "latency_ms": self.latency_ms,
            "on_latency_front": self.on_latency_front,
            "quality": quality.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Sweep:
    """All measured plans, the shallowest first. `intact`: FFNs of the model as it is. `predicted_for`: what latencies
    are of, such as "h100, tp 8, bf16, batch 1, decode at 1024 tokens"; None where there are none.
    """

    points: tuple[SweepPoint, ...]
    intact: int
    predicted_for: str | None = None

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The plans that no other beats in both depth and loss."""
        return tuple(point for point in self.points if point.on_front)

    def __str__(self) -> str:
        rows = [
            (
                f"{point.measured.depth}{' *' * point.on_front}",
                ", ".join(map(str, point.measured.plan.dropped_attention)) or "none",
                "; ".join(map(told, point.measured.plan.groups)) or "none",
                point.measured.quality.loss_increase,
            )
            for point in self.points
        ]
        head = ("FFN depth", "attention dropped", "layers in one FFN", "loss increase")
        return table(head, rows, f"* on the front; the intact model has FFN depth {self.intact}")

    def to_dict(self) -> dict[str, Any]:
        points = [point.to_dict() for point in self.points]
        return {"intact_depth": self.intact, "predicted_for": self.predicted_for, "points": points}

    def to_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """One row for each plan. Raises `OptionError` where another file is there, unless with `overwrite`."""
        columns = (
            "depth dropped fused_bytes on_front loss perplexity perplexity_low perplexity_high loss_increase kl top1"
        )
        with (
            replacing(path, _KIND, overwrite=overwrite) as beside,
            open(beside, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            more = ("dropped_attention", "groups", "norm", "latency_ms", "on_latency_front", "predicted_for", "removed")
            writer.writerow([*columns.split(), *more])
            for point in self.points:
                removed = " ".join(map(str, point.measured.plan.removed))
                writer.writerow([*_row(point), self.predicted_for or "", removed])
        return Path(path)

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Depth against perplexity with its front, also latency where it is predicted; PNG or SVG by the suffix.

        Raises `OptionError` where another file is there, unless with `overwrite`.
        """
        panels = [self._panel("FFN depth", lambda point: point.measured.depth, lambda point: point.on_front)]
        if all(point.latency_ms is not None for point in self.points):
            label = "predicted latency [ms]" + (f": {self.predicted_for}" if self.predicted_for else "")
            panels.append(
                self._panel(label, lambda point: point.latency_ms or 0.0, lambda point: point.on_latency_front)
            )
        with style(), replacing(path, _KIND, overwrite=overwrite) as beside:
            save(draw_panels(panels, "What depth costs"), beside, Path(path).suffix)
        return Path(path)

    def _panel(self, label: str, place: Callable[[SweepPoint], float], is_front: Callable[[SweepPoint], bool]) -> Panel:
        def spots(points: Iterable[SweepPoint]) -> list[tuple[float, float]]:
            return [(place(point), float(point.measured.quality.perplexity)) for point in points]

        by_count: dict[int, list[SweepPoint]] = {}
        for point in self.points:
            by_count.setdefault(len(point.measured.plan.dropped_attention), []).append(point)
        lines = [
            Line(label=f"{count} attentions dropped", points=spots(by_count[count]), look="o")
            for count in sorted(by_count)
        ]
        front = sorted(filter(is_front, self.points), key=place)
        lines.append(Line(label="front", points=spots(front), look="-", front=True))
        return Panel(across=label, up="perplexity", lines=lines, log_y=10)


def sweep(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    drops: Sequence[int] | None = None,
    max_members: int | None = None,
    max_width: int | None = None,
    max_bytes: int | None = None,
    max_dependency: float | None = None,
    norm: NormMode | None = None,
    method: Method = "loss",
    hardware: str | os.PathLike[str] | Hardware | None = None,
    workload: Workload | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    roads: Sequence[str] | None = None,
    after_refit: bool = False,
    max_window: int | None = None,
) -> Sweep:
    """Measure the best plan at every depth, for several numbers of dropped attentions. Arguments as `make_plan`.

    `drops`: numbers of attention layers to drop (default: about six numbers from none to half of them). With `hardware`
    each plan has its predicted latency too, and there is a second front. With `roads` (and `after_refit`, `max_window`)
    the best plan over these roads at every depth, whatever it drops.

    Raises `OptionError` for arguments that contradict each other.
    """
    if workload is not None and hardware is None:
        raise OptionError("workload: name the device that it runs on, such as hardware='h100'")
    asked = Request.of({**locals(), "every_depth": True})
    search = search_for(model, list(batches), asked, method, cache, progress)
    if hardware is None:
        return run_sweep(search, drops)
    found = run_sweep(search, drops, predicted_latency(search.judge, hardware, workload=workload).of)
    return replace(found, predicted_for=_setting(Hardware.of(hardware), workload))


def _setting(device: Hardware, workload: Workload | None) -> str:
    work = workload or Workload()
    return f"{device.name}, tp {work.tp}, {work.precision}, batch {work.batch}, {work.phase} at {work.context} tokens"


def run_sweep(
    search: Search, drops: Sequence[int] | None = None, latency: Callable[[FusionPlan], float] | None = None
) -> Sweep:
    """A sweep with a search that may have measured things already. `latency`: what predicts it [ms]."""
    found: dict[tuple[int, int], Measured] = {}
    for start, depth in search.every_depth(drops):
        best = search.intact if not start and depth == search.judge.ffns else search.try_at(start, depth, ANYTHING)
        if best is not None:
            key = (len(start), best.depth)
            if key not in found or best.cost < found[key].cost:
                found[key] = best
    return _swept(found.values(), search.judge.ffns, latency)


def _swept(found: Iterable[Measured], ffns: int, latency: Callable[[FusionPlan], float] | None) -> Sweep:
    measured = sorted(found, key=lambda one: (one.depth, one.cost))
    points = [SweepPoint(one, latency_ms=latency and latency(one.plan)) for one in measured]
    front = _front(points, lambda point: point.measured.depth)
    quick = _front(points, lambda point: point.latency_ms or 0.0) if latency is not None else set()
    marked = (
        replace(point, on_front=index in front, on_latency_front=index in quick) for index, point in enumerate(points)
    )
    return Sweep(tuple(marked), ffns)


def _front(points: Sequence[SweepPoint], place: Callable[[SweepPoint], float]) -> set[int]:
    """The points that no other beats: none before them, in that order, has as little loss."""
    found, best = set(), float("inf")
    for index in sorted(range(len(points)), key=lambda at: (place(points[at]), points[at].measured.cost)):
        if points[index].measured.cost < best:
            best = points[index].measured.cost
            found.add(index)
    return found


def _row(point: SweepPoint) -> list[Any]:
    measured, quality = point.measured, point.measured.quality
    values = (
        *(quality.loss, quality.perplexity, quality.perplexity.low, quality.perplexity.high),
        *(quality.loss_increase, quality.kl, quality.top1),
    )
    return [
        measured.depth,
        len(measured.plan.dropped_attention),
        measured.fused_bytes,
        int(point.on_front),
        *("" if value is None else f"{float(value):.6g}" for value in values),
        " ".join(map(str, measured.plan.dropped_attention)),
        "; ".join(" ".join(map(str, [*group, *[group.mixers] * group.is_window])) for group in measured.plan.groups),
        measured.plan.norm,
        "" if point.latency_ms is None else f"{point.latency_ms:.6g}",
        "" if point.latency_ms is None else int(point.on_latency_front),
    ]
