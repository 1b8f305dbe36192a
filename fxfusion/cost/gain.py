"""When fusing pays: its gain over tensor-parallel size, batch, scale and baseline, as a table, CSV and plot.

Gain is the latency before over the latency after, on the same baseline: how kernels are launched, and whether norms are
part of all-reduces. Scale: the same layers with hidden size, heads and widths of a smaller or larger model.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fxfusion.cost.hardware import Hardware
from fxfusion.cost.kernels import AllReduce, Launch, Workload
from fxfusion.cost.sublayers import Attention, Ffn, Step, Sublayer
from fxfusion.cost.timing import step_time
from fxfusion.errors import OptionError
from fxfusion.files import replacing
from fxfusion.report.charts.figure import save, style
from fxfusion.report.charts.lines import Line, Panel, draw_panels

SIZES = (1, 2, 4, 8)
BATCHES = (1, 4, 16, 64, 256, 1024)
SCALES = (0.125, 0.25, 0.5, 1.0)
BASELINES: tuple[tuple[Launch, AllReduce], ...] = (
    ("cuda-graph", "plain"),
    ("cuda-graph", "fused-norm"),
    ("eager", "plain"),
    ("megakernel", "plain"),
)
LITTLE = 1.02  # a gain below this does not pay for another model
_GRAIN = 32  # channels: sizes of a scaled model are multiples, so that 8 devices can share them


@dataclass(frozen=True, slots=True, kw_only=True)
class GainPoint:
    """One setting: latencies in milliseconds. `scale` 1: the model itself, of `hidden` channels."""

    launch: Launch
    all_reduce: AllReduce
    tp: int
    batch: int
    scale: float
    hidden: int
    before_ms: float
    after_ms: float

    @property
    def gain(self) -> float:
        return self.before_ms / self.after_ms

    @property
    def baseline(self) -> str:
        """What both run on, in words."""
        return self.launch + (f", {self.all_reduce}" if self.all_reduce != "plain" else "")

    def to_dict(self) -> dict[str, Any]:
        names = ("launch", "all_reduce", "tp", "batch", "scale", "hidden", "before_ms", "after_ms", "gain")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Gains:
    """All points. `refused`: settings that cannot be had, in words."""

    name: str
    hardware: str
    precision: str
    points: tuple[GainPoint, ...]
    refused: tuple[str, ...] = ()

    @property
    def little(self) -> str:
        """Where fusing gains next to nothing, in words."""
        few = sum(point.gain < LITTLE for point in self.points)
        return f"fusing gains under {LITTLE - 1:.0%} in {few} of {len(self.points)} settings"

    def of(self, baseline: str) -> tuple[GainPoint, ...]:
        """The points of one baseline."""
        return tuple(point for point in self.points if point.baseline == baseline)

    @property
    def baselines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.baseline for point in self.points))

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "hardware": self.hardware,
            "precision": self.precision,
            "points": [point.to_dict() for point in self.points],
            "refused": list(self.refused),
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """CSV by that suffix, a plot by .png, .svg or .pdf.

        Raises `OptionError` for another suffix, or where another file is there, unless with `overwrite`.
        """
        writers: dict[str, Callable[[Path], None]] = {".csv": self._csv}
        writers |= dict.fromkeys((".png", ".svg", ".pdf"), self._plot)
        found = Path(path)
        if found.suffix.lower() not in writers:
            raise OptionError(f"{found}: expected a name that ends in {', '.join(writers)}")
        with replacing(found, "gains", overwrite=overwrite) as beside:
            writers[found.suffix.lower()](beside)
        return found

    def _csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = [point.to_dict() for point in self.points]
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _plot(self, path: Path) -> None:
        """A row for each baseline, a panel for each scale: batch against gain, a line for each tensor-parallel size."""
        panels = []
        scales = sorted({(point.scale, point.hidden) for point in self.points})
        for baseline, (scale, hidden) in product(self.baselines, scales):
            chosen = [point for point in self.of(baseline) if point.scale == scale]
            lines = [
                Line(label=f"tp {tp}", points=[(point.batch, point.gain) for point in chosen if point.tp == tp])
                for tp in sorted({point.tp for point in chosen})
            ]
            words, up = f"{baseline}\nhidden size {hidden}", "latency before / after"
            panels.append(Panel(title=words, across="sequences at once", up=up, lines=lines, log_x=2, level=1.0))
        title = f"Predicted gain of fusing: {self.name}, {self.hardware}, {self.precision}"
        with style():
            figure = draw_panels(panels, title, width=250, share_y=True, columns=len(scales))
            save(figure, path, path.suffix)


def gains(
    before: Step,
    after: Step,
    work: Workload,
    device: Hardware,
    *,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    scales: Sequence[float] = SCALES,
    baselines: Sequence[tuple[Launch, AllReduce]] | None = None,
) -> Gains:
    """The gain from `before` to `after` in each setting; `baselines`: launch and all-reduce (default: those of `work`).

    Raises `OptionError` where none can be had.
    """
    points: list[GainPoint] = []
    refused: dict[str, None] = {}
    for (launch, all_reduce), scale, tp in product(baselines or [(work.launch, work.all_reduce)], scales, sizes):
        steps = [scaled(step, scale) for step in (before, after)]
        setting: dict[str, Any] = {"launch": launch, "all_reduce": all_reduce, "tp": tp}
        for batch in batches:
            now = replace(work, batch=batch, **setting)
            try:
                one, other = (step_time(step, now, device).seconds.total * 1e3 for step in steps)
            except OptionError as error:
                refused[f"scale {scale:g}, tp {tp}: {error}"] = None
                break
            size: dict[str, Any] = {"scale": scale, "hidden": steps[0].hidden}
            points.append(GainPoint(batch=batch, before_ms=one, after_ms=other, **setting, **size))
    if not points:
        raise OptionError(f"no setting can be had: {next(iter(refused)) if refused else 'nothing was asked for'}")
    return Gains(before.name, device.name, work.precision, tuple(points), tuple(refused))


def scaled(step: Step, scale: float) -> Step:
    """The same layers of a model whose hidden size, heads and widths are so many times larger.

    Heads keep their size, and key-value heads stay where there are as many heads. Widths become multiples of 32.
    """
    if scale == 1.0:
        return step
    return replace(
        step,
        hidden=_round(step.hidden * scale, _GRAIN),
        sublayers=tuple(_scaled(part, scale) for part in step.sublayers),
    )


def _scaled(part: Sublayer, scale: float) -> Sublayer:
    if isinstance(part, Ffn):
        return replace(part, width=_round(part.width * scale, _GRAIN))
    return _scaled_attention(part, scale)


def _scaled_attention(part: Attention, scale: float) -> Attention:
    heads = _round(part.heads * scale, min(part.kv_heads, part.heads))
    return replace(part, heads=heads, beside=tuple(_scaled_attention(kind, scale) for kind in part.beside))


def _round(value: float, grain: int) -> int:
    return max(1, round(value / grain)) * grain
