"""The plots of docs/results.md: loss against dropped attentions, and the planner against the paper's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.choosing_cells import Row, value
from bench.plots import new_figure, save


def plot_drop_curves(curves: Mapping[str, Sequence[Row]], path: Path) -> None:
    figure, axes = new_figure(x="attentions dropped", y="loss above intact [nats per token]")
    for index, (name, curve) in enumerate(curves.items()):
        xs = range(len(curve))
        axes.plot(xs, [value(row) for row in curve], "o-", ms=3, label=name, color=f"C{index}")
        low, high = ([row["loss_increase"][end] for row in curve] for end in ("low", "high"))
        axes.fill_between(xs, low, high, alpha=0.15, color=f"C{index}", linewidth=0)
    axes.set_yscale("symlog", linthresh=0.05)
    axes.legend(title="order by")
    save(figure, path)


def plot_planner(rows: Sequence[Row], path: Path) -> None:
    figure, axes = new_figure(
        x="paper's rule: loss above intact [nats]",
        y="planner: loss above intact [nats]",
        title="each point: one set of dropped attentions, one depth",
        size=(5.2, 4.8),
    )
    paper, ours = [value(row["paper"]) for row in rows], [value(row["planner"]) for row in rows]
    axes.plot(paper, ours, "o", ms=4, alpha=0.7)
    ends = [min([*paper, *ours]), max([*paper, *ours])]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    save(figure, path)
