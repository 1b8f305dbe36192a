"""The section of docs/results.md on refits. Sentences that compare numbers are made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.choosing_cells import cell, groups_of, span, table, value
from bench.page_sections import put_section
from bench.plots import draw_lines, new_figure, save

DOCS = Path("docs")
TOKENS_PER_BATCH = 2048


def write_section(results: Mapping[str, Any], left_out: Sequence[str] = (), folder: Path = DOCS) -> Path:
    """Write the section and its plot. `left_out`: cells that were not measured."""
    plot_tokens(results["tokens"], folder / "figures" / "refit_tokens.svg")
    parts = [
        introduction(results),
        *([f"**Not measured yet: {len(left_out)} cells**, among them {'; '.join(left_out[:3])}."] if left_out else []),
        budget_table(results["budgets"]["rows"]),
        figures(results["budgets"]["rows"]),
        fusion_section(results["fusion"]),
        later_section(results["later"]),
        tokens_section(results["tokens"]),
        penalty_section(results["penalties"]),
        cost_section(results["cost"]),
    ]
    return put_section(folder / "results.md", "recovery", "\n\n".join(parts))


def _tokens(batches: int) -> str:
    return f"{batches * TOKENS_PER_BATCH:,}"


def introduction(results: Mapping[str, Any]) -> str:
    fitted, held_out = (_tokens(number) for number in (results["budgets"]["batches"], results["heldout"]))
    return f"""## Refitting in closed form

Made by `python -m bench.recovery`. `refit` fits the last linear layer of each fused FFN, of each later FFN and of each
later attention so that the residual stream is again the reference's: the unfused model's, or the intact model's. Fitted
to (and penalties chosen on) {fitted} calibration tokens, measured on {held_out} held-out tokens, as loss above the
intact model with a 95 % interval. Shapes and speed stay. Attention is dropped from the neighbouring layers where that
costs least."""


def budget_table(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [
        (
            span(row["dropped"]),
            groups_of(row),
            cell(row["as_it_is"]["perplexity"]),
            cell(row["as_it_is"]["loss_increase"]),
            "-" if row["unfused"] is None else cell(row["unfused"]["loss_increase"]),
            cell(row["intact"]["loss_increase"]),
            cell(row["intact"]["perplexity"]),
        )
        for row in rows
    ]
    header = ["attention dropped", "FFNs fused", "perplexity as it is", "loss as it is", "refitted to unfused"]
    return table([*header, "refitted to intact", "perplexity then"], shown)


def figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much of what was lost comes back."""
    unfused = {tuple(row["dropped"]): value(row["as_it_is"]) for row in rows if not row["groups"]}
    lines = []
    for dropped, cost in unfused.items():
        own = [row for row in rows if tuple(row["dropped"]) == dropped and row["groups"]]
        if not own:
            continue
        best = min(own, key=lambda row: value(row["intact"]))
        below = sum(value(row["intact"]) < cost for row in own)
        lines.append(
            f"* attention dropped from {span(dropped)}: fused and refitted to the intact model loses less than the "
            f"unfused model in {below} of {len(own)} choices; the best ({groups_of(best)}) brings back "
            f"{1 - value(best['intact']) / cost:.0%} of the {cost:.3f} nats that dropping cost."
        )
        for row in own:
            harm = value(row["as_it_is"]) - cost
            if harm > 0.01:
                left = value(row["unfused"]) - cost
                lines.append(
                    f"* fusing {groups_of(row)} cost {harm:.3f} nats more; refitted to the unfused model "
                    f"{left:+.3f} are left ({1 - left / harm:.0%} removed)."
                )
    if not lines:
        return "Not all of it has been measured (`python -m bench.recovery` goes on)."
    note = "Where fusing alone cost 0.01 nats or less there is nothing to remove, and no line says so."
    return "\n".join(lines) + f"\n\n{note}"


_LATER = {"none": "the groups alone", "ffn": "and every later FFN", "all": "and every later attention's output"}


def fusion_section(found: Mapping[str, Any]) -> str:
    if found["unfused"] is None or found["fused"] is None:
        return ""
    base = value(found["unfused"])
    harm = value(found["fused"]) - base
    rows = [
        (_LATER[row["later"]], _tokens(row["batches"]), f"{value(row) - base:+.4f}")
        + (f"{1 - (value(row) - base) / harm:.0%}",)
        for row in found["rows"]
    ]
    removed = max((1 - (value(row) - base) / harm for row in found["rows"]), default=0.0)
    return f"""### Repairing fusion alone

On the runs above fusing costs next to nothing. On a run that few would choose, attention dropped from
{span(found["dropped"])} ({base:+.3f} nats), fusing {groups_of(found)} costs {harm:.4f} nats more. Refitted to the
unfused model at most {removed:.0%} of that go away (the goal was 80 %):

{table(["refitted", "calibration tokens", "loss above unfused", "removed"], rows)}"""


def later_section(found: Mapping[str, Any]) -> str:
    rows = [(_LATER[row["later"]], cell(row["loss_increase"]), len(row["refit"]["fits"])) for row in found["rows"]]
    return f"""### What is refitted

Attention dropped from {span(found["dropped"])}, FFNs {groups_of(found)} fused, refitted to the intact model on
{_tokens(found["batches"])} tokens.

{table(["refitted", "loss", "layers"], rows)}

Going over the layers a second time changes nothing: each is fitted to what the layers before it make of the text, and
no later layer changes that."""


def tokens_section(found: Mapping[str, Any]) -> str:
    rows = [(_tokens(row["batches"]), cell(row["loss_increase"])) for row in found["rows"]]
    return f"""### How much text

The same plan. An eighth of the tokens decides on penalties, the others are fitted to.

![loss against calibration tokens](figures/refit_tokens.svg)

{table(["calibration tokens", "loss"], rows)}"""


def plot_tokens(found: Mapping[str, Any], path: Path) -> None:
    from bench.timing import Interval

    figure, axes = new_figure(x="calibration tokens", y="loss above intact [nats per token]")
    points = []
    for row in found["rows"]:
        loss = row["loss_increase"]
        points.append((row["batches"] * TOKENS_PER_BATCH, Interval(**{k: loss[k] for k in loss})))
    draw_lines(axes, {"fused and refitted": points})
    axes.set_xscale("log")
    save(figure, path)


def penalty_section(found: Mapping[str, Any]) -> str:
    rows = [
        ("chosen, layer by layer" if row["penalty"] is None else f"{row['penalty']:g}", cell(row["loss_increase"]))
        for row in found["rows"]
    ]
    return f"""### The penalty

The same plan on {_tokens(found["batches"])} tokens: one penalty for all layers (as a part of the mean diagonal of the
Gram matrix), and the one that is chosen for each layer on text that was not fitted to.

{table(["penalty", "loss"], rows)}"""


def cost_section(found: Mapping[str, Any]) -> str:
    if found["refit"] is None or found["evaluate"] is None:
        return ""
    whole, once = found["refit"]["seconds"], found["evaluate"]["seconds"]
    peak = found["refit"]["peak_bytes"] / 2**20
    return f"""### Time and memory

The same plan on {_tokens(found["batches"])} tokens took {whole:.0f} seconds in all, {whole / once:.1f} times the
{once:.0f} seconds of evaluating the intact model on the same tokens; the process held {peak:,.0f} MiB at most."""
