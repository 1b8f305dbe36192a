"""The plots of the section on three roads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.plots import Point, draw_lines, new_figure, save
from bench.timing import Interval

Rows = Sequence[Mapping[str, Any]]


def plot_fronts(fronts: Mapping[str, Rows], folder: Path) -> None:
    """Loss as it is and after a refit, against FFN depth and against predicted latency."""
    axes_of = {
        "depth": ("FFNs one behind the other", lambda row: float(row["depth"])),
        "tp1": ("predicted ms for a token, one H100", lambda row: float(row["predicted_ms"]["tp1"])),
        "tp8": ("predicted ms for a token, eight H100", lambda row: float(row["predicted_ms"]["tp8"])),
    }
    for name, (label, x) in axes_of.items():
        figure, axes = new_figure(x=label, y="loss above intact [nats per token]")
        for kind, style in (("as_is", "--"), ("refitted", "-")):
            series: dict[str, list[Point]] = {}
            for road, rows in fronts.items():
                points = [(x(row), Interval(**row[kind]["loss_increase"])) for row in rows if row[kind] is not None]
                if points:
                    label = f"{road}, refitted" if kind == "refitted" else road
                    series[label] = sorted(points, key=lambda point: point[0])
            before = len(axes.containers)
            draw_lines(axes, series)
            for label, container in zip(series, axes.containers[before:], strict=True):
                for part in (container[0], *container[1], *container[2]):
                    part.set_color(f"C{list(fronts).index(label.removesuffix(', refitted'))}")
                container[0].set_linestyle(style)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.legend(fontsize="x-small", ncols=2)
        save(figure, folder / f"roads_{name}.svg")


def plot_positions(found: Rows, path: Path) -> None:
    """A heat map for each road: first layer by size; white: not measured."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    roads = list(dict.fromkeys(one["road"] for one in found))
    firsts, sizes = max(one["first"] for one in found) + 1, max(one["size"] for one in found)
    figure = Figure(figsize=(4.2 * len(roads), 3.0), layout="constrained")
    grid = figure.subplots(1, len(roads), squeeze=False)[0]
    for axes, road in zip(grid, roads, strict=True):
        values = torch.full((sizes - 1, firsts), float("nan"))
        for one in found:
            if one["road"] == road:
                values[one["size"] - 2, one["first"]] = max(one["cost"], 1e-4)
        image = axes.imshow(values.numpy(), norm=LogNorm(1e-4, 1.0), cmap="viridis", origin="lower", aspect="auto")
        axes.set_title(road, fontsize="small")
        axes.set_xlabel("first layer")
        axes.set_ylabel("layers")
        axes.set_xticks(range(firsts))
        axes.set_yticks(range(sizes - 1), range(2, sizes + 1))
    figure.colorbar(image, ax=list(grid), label="loss above intact [nats]")
    save(figure, path)


def plot_cpu(found: Rows, path: Path) -> None:
    figure, axes = new_figure(x="ms for one token on this CPU", y="loss after refit [nats per token]", size=(6.0, 4.0))
    for one in found:
        loss = 0.0 if one["name"] == "intact" else one.get("loss")
        if loss is not None:
            axes.plot(one["milliseconds"], loss, "o", ms=5)
            axes.annotate(
                one["name"], (one["milliseconds"], loss), fontsize="x-small", xytext=(4, 3), textcoords="offset points"
            )
    save(figure, path)
