"""The section of docs/results.md on training. Sentences that compare numbers are made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.choosing_cells import cell, groups_of, span, table, value
from bench.page_sections import put_section
from bench.plots import draw_lines, new_figure, save

DOCS = Path("docs")


def write_section(results: Mapping[str, Any], folder: Path = DOCS) -> Path:
    """Write the section and its plot."""
    plot_curves(results, folder / "figures" / "recovery_training.svg")
    parts = [introduction(results), start_table(results), comparison(results)]
    return put_section(folder / "results.md", "recovery training", "\n\n".join(parts))


def introduction(results: Mapping[str, Any]) -> str:
    text, steps = results["text"], len(results["rows"][0]["curve"])
    return f"""## Training, from the raw and from the refitted start

Made by `python -m bench.recovery_training`. Attention dropped from {span(results["dropped"])}, FFNs fused
{groups_of(results)}. `recover` trains all weights for {steps} steps of {text["tokens_per_step"]:,} tokens (KL to the
intact model, AdamW); all runs see the same batches in the same order, and the refit saw {text["refit"]:,} tokens
before. Loss above the intact model on held-out text, with a 95 % interval.

![KL on the text for validation against steps](figures/recovery_training.svg)"""


def start_table(results: Mapping[str, Any]) -> str:
    shown = [
        (
            row["start"],
            f"{row['learning_rate']:g}",
            cell(row["before"]["loss_increase"]),
            cell(row["after"]["loss_increase"]),
            cell(row["before"]["kl"]),
            cell(row["after"]["kl"]),
            f"{row['seconds_start']:.0f}",
            f"{row['seconds']:.0f}",
        )
        for row in results["rows"]
    ]
    header = [
        "start",
        "largest learning rate",
        "loss before",
        "loss after",
        "KL before",
        "KL after",
        "seconds to have it",
        "seconds of training",
    ]
    return table(header, shown)


def comparison(results: Mapping[str, Any]) -> str:
    """What the refit is worth in steps, and what is left of it after training."""
    raw, refitted = (best_of(results["rows"], name) for name in ("raw", "refitted"))
    goal = refitted["validation_before"]
    reached = [row["step"] for row in raw["curve"] if row["validation"] is not None and row["validation"] <= goal]
    steps = len(raw["curve"])
    worth = (
        f"From the raw start, {reached[0]} steps come to where the refit begins"
        if reached
        else f"From the raw start, {steps} steps do not come to where the refit begins"
    )
    lead = value(raw["after"]) - value(refitted["after"])
    kept = "lower" if lead > 0 else "higher"
    return f"""{worth} (KL {goal:.3f} on the text for validation, had in {refitted["seconds_start"]:.0f} seconds). After
{steps} steps from each, at the rate that did best on the text for validation ({raw["learning_rate"]:g} and
{refitted["learning_rate"]:g}), the refitted start's held-out loss is {abs(lead):.3f} nats {kept}."""


def best_of(rows: Sequence[Mapping[str, Any]], start: str) -> Mapping[str, Any]:
    """The run from a start that came to the least KL on the text for validation."""
    own = [row for row in rows if row["start"] == start]
    return min(own, key=lambda row: min(kl for _, kl in measured(row)))


def plot_curves(results: Mapping[str, Any], path: Path) -> None:
    figure, axes = new_figure(x="steps", y="KL on the text for validation [nats per token]")
    draw_lines(axes, {f"{row['start']} start, {row['learning_rate']:g}": measured(row) for row in results["rows"]})
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, path)


def measured(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The start and every measurement on the text for validation: (step, KL)."""
    later = [(float(one["step"]), float(one["validation"])) for one in row["curve"] if one["validation"] is not None]
    return [(0.0, float(row["validation_before"])), *later]
