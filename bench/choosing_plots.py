"""The plots of docs/results.md: loss against dropped attentions, and the planner against the paper's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.choosing_cells import Row, value


def plot_drop_curves(curves: Mapping[str, Sequence[Row]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        xs = range(len(curve))
        axes.plot(xs, [value(row) for row in curve], "o-", ms=3, label=name, color=f"C{index}")
        low, high = ([row["loss_increase"][end] for row in curve] for end in ("low", "high"))
        axes.fill_between(xs, low, high, alpha=0.15, color=f"C{index}", linewidth=0)
    axes.set_xlabel("attentions dropped")
    axes.set_ylabel("loss above intact [nats per token]")
    axes.set_yscale("symlog", linthresh=0.05)
    axes.grid(alpha=0.3)
    axes.legend(title="order by")
    save(figure, path)


def plot_planner(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    axes = figure.subplots()
    paper, ours = [value(row["paper"]) for row in rows], [value(row["planner"]) for row in rows]
    axes.plot(paper, ours, "o", ms=4, alpha=0.7)
    ends = [min([*paper, *ours]), max([*paper, *ours])]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set_xlabel("paper's rule: loss above intact [nats]")
    axes.set_ylabel("planner: loss above intact [nats]")
    axes.set_title("each point: one set of dropped attentions, one depth", fontsize="small")
    axes.grid(alpha=0.3)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """The same plot is the same file: its ids are drawn by name, not by chance."""
    with rc_context({"svg.hashsalt": "fxfusion"}):
        figure.savefig(path, metadata={"Date": None})
