"""What the arena measured: cells by method and depth, as a table, CSV and plot. Loads no torch."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxfusion.files import replacing
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.report.charts.comparison import Curve, curves_of, draw
from fxfusion.report.charts.figure import save, style

KIND = "comparison"
_COLUMNS = (
    *("depth", "method", "refitted", "ffn_depth", "latency_ms", "perplexity", "loss", "loss_increase", "kl", "flips"),
    *("agreement", "probes", "lowest_kl", "what", "problem"),
)


@dataclass(frozen=True, slots=True)
class Entrant:
    """What a method makes of the model: a plan; or layers whose FFN goes (`ffns`); or the layers that the plan removes,
    with a linear map in their place (`mapped`)."""

    method: str
    plan: FusionPlan
    ffns: tuple[int, ...] = ()
    mapped: bool = False

    @property
    def can_be_refitted(self) -> bool:
        """Whether it is a plan and nothing else."""
        return not (self.ffns or self.mapped or self.plan.changes_nothing)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "plan": self.plan.to_dict(), "ffns": list(self.ffns), "mapped": self.mapped}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entrant:
        """What `to_dict` gave."""
        return cls(data["method"], FusionPlan(**data["plan"]), tuple(data["ffns"]), data["mapped"])

    def __str__(self) -> str:
        """In words, such as `wide 4-5 6-7; removed 12`."""
        plan = self.plan
        parts = [f"{group.mixers if group.is_window else 'fused'} {group[0]}-{group[-1]}" for group in plan.groups]
        for word, layers in (
            ("attention dropped", plan.dropped_attention),
            ("one map for" if self.mapped else "removed", plan.removed),
            ("FFNs removed", self.ffns),
        ):
            parts += [f"{word} {' '.join(map(str, layers))}"] if layers else []
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method at one depth. `depth`: asked for; `ffns`: what it is; `repaired`: after a refit. `quality`: as of
    `Quality.to_dict`. `agreement`: the part of greedily written tokens before the first difference; `probes`: for each
    kind, the part solved of what the intact model solves. `problem`: why there is no such cell.
    """

    method: str
    depth: int
    repaired: bool
    entrant: Entrant | None = None
    ffns: int | None = None
    latency_ms: float | None = None
    quality: Mapping[str, Any] | None = None
    agreement: float | None = None
    probes: Mapping[str, float | None] | None = None
    problem: str = ""

    def value(self, measure: str) -> float | None:
        """Of the quality, such as `"kl"`; None where it was not measured."""
        found = None if self.quality is None else self.quality.get(measure)
        return None if found is None else found["value"]

    @property
    def name(self) -> str:
        return f"{self.method}{' + refit' if self.repaired else ''}"

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("method", "depth", "repaired", "ffns", "latency_ms")}
        more = {name: getattr(self, name) for name in ("quality", "agreement", "probes", "problem")}
        told = None if self.entrant is None else self.entrant.to_dict()
        return {**fields, "entrant": told, "what": str(self.entrant or ""), **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`ffns`, `latency_ms`: of the intact model; `tokens`: chosen and fitted on, and judged by."""

    cells: tuple[Cell, ...]
    ffns: int
    latency_ms: float
    predicted_for: str
    tokens: tuple[int, int]

    @property
    def best(self) -> dict[int, Cell]:
        """For each depth the cell of least KL, of those that are at the depth."""
        found: dict[int, Cell] = {}
        for cell in self.cells:
            kl = cell.value("kl")
            if kl is not None and cell.ffns is not None and cell.ffns <= cell.depth:
                known = found.get(cell.depth)
                if known is None or kl < (known.value("kl") or 0.0):
                    found[cell.depth] = cell
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "intact": {"ffns": self.ffns, "latency_ms": self.latency_ms},
            "predicted_for": self.predicted_for,
            "tokens": {"chosen_and_fitted_on": self.tokens[0], "judged_by": self.tokens[1]},
            "cells": [cell.to_dict() for cell in self.cells],
            "best": {str(depth): cell.name for depth, cell in self.best.items()},
        }

    def to_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """One row for each cell. Raises `OptionError` where another file is there, unless with `overwrite`."""
        with (
            replacing(path, KIND, overwrite=overwrite) as beside,
            open(beside, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(self._row(cell) for cell in self.cells)
        return Path(path)

    def _row(self, cell: Cell) -> list[Any]:
        top1 = cell.value("top1")
        numbers = [
            *(cell.latency_ms, *(cell.value(name) for name in ("perplexity", "loss", "loss_increase", "kl"))),
            *(None if top1 is None else 1 - top1, cell.agreement, (cell.probes or {}).get("all")),
        ]
        least = int(self.best.get(cell.depth) is cell)
        head = [cell.depth, cell.method, int(cell.repaired), "" if cell.ffns is None else cell.ffns]
        return [*head, *map(_written, numbers), least, str(cell.entrant or ""), cell.problem]

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """KL to the intact model against depth and predicted latency; PNG, SVG or PDF by the suffix.

        Raises `OptionError` where another file is there, unless with `overwrite`.
        """
        with style(), replacing(path, KIND, overwrite=overwrite) as beside:
            figure = draw(self.curves(), self.predicted_for)
            save(figure, beside, Path(path).suffix)
        return Path(path)

    def curves(self) -> list[Curve]:
        """One for each method, raw and refitted."""
        return curves_of(
            (cell.method, cell.repaired, cell.ffns, cell.latency_ms, cell.value("kl")) for cell in self.cells
        )


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
