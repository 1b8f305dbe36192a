"""The section of docs/results.md on models with all their attention, from the numbers of `bench.roads`.

Every sentence that compares two numbers is made from the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.choosing_cells import Row, fine_cell, span, table
from bench.page_sections import put_section
from bench.roads_plots import plot_cpu, plot_fronts, plot_positions

DOCS = Path("docs")
BOUNDS = {7: 0.015, 9: 0.005}  # nats after refit at these FFN depths, which issue 7 asks for


def write_page(results: Mapping[str, Any], folder: Path = DOCS) -> Path:
    """Write the section and its plots."""
    figures = folder / "figures"
    plot_fronts(results["fronts"], figures)
    sections = [introduction(results), front_section(results["fronts"])]
    if "equal_latency" in results:
        sections.append(latency_section(results["equal_latency"]))
    if "cpu_latency" in results:
        plot_cpu(results["cpu_latency"], figures / "roads_cpu.svg")
        sections.append(cpu_section(results["cpu_latency"]))
    if "positions" in results:
        plot_positions(results["positions"], figures / "roads_positions.svg")
        sections.append(position_section(results["positions"]))
    if "whole_blocks" in results:
        sections.append(block_section(results["whole_blocks"]))
    if "second" in results:
        sections.append(second_section(results["second"]))
    return put_section(folder / "results.md", "roads", "\n\n".join(sections))


def introduction(results: Mapping[str, Any]) -> str:
    text = results["text"]
    return f"""# Three roads for a model with all its attention

Made by `make results` (`python -m bench.roads`) on the reference model, all 12 attentions intact. In a window of
layers the attention between the FFNs is dropped, hoisted (it goes first, one after another) or made wide (it goes
first, all reading one input); then the FFNs become one. "Mixed" plans take each window's road from all three, where
that is surely better on the text that they are chosen on. Here windows are chosen on 2,048 calibration tokens by
their loss as they are (`fxfusion plan --after-refit` judges by the loss after a refit); refits take
{text["refit"] * text["tokens"]:,} calibration tokens, and losses are measured on
{text["heldout"] * text["tokens"]:,} held-out tokens: nats per token above the intact model on the same tokens, with a
95 % bootstrap interval over sequences."""


def front_section(fronts: Mapping[str, Sequence[Row]]) -> str:
    rows = [
        [name, f"{row['depth']:.0f}", plan_words(row), loss(row, "as_is"), loss(row, "refitted")]
        for name, found in fronts.items()
        for row in found
    ]
    reached = []
    for depth, bound in BOUNDS.items():
        tried = {name: at(found, depth) for name, found in fronts.items()}
        values = {name: value(row, "refitted") for name, row in tried.items() if row is not None}
        best = min(values, key=values.__getitem__)
        verdict = "reached" if values[best] <= bound else "not reached"
        reached.append(f"12 -> {depth} FFNs at no more than +{bound}: {verdict}, {values[best]:+.4f} ({best})")
    return f"""## Loss against FFN depth

![loss against FFN depth](figures/roads_depth.svg)

{table(["road", "FFNs left", "windows", "loss as it is", "loss after refit"], rows)}

The figures to reach, after a refit: {"; ".join(reached)}. A refit that does not bring the loss down on its own
validation text is not applied; both losses are then the same.

Against predicted latency, of the same plans. The cost model (`fxfusion.cost`) predicts what one decoded token takes in
bfloat16, batch 1, 1,024 tokens in the cache, on one H100 and on eight with tensor parallelism, for a model of as many
layers of the size of Llama-3.3-70B's: the reference model is far too small for such devices.

![loss against predicted latency on one H100](figures/roads_tp1.svg)

![loss against predicted latency on eight H100](figures/roads_tp8.svg)"""


def latency_section(found: Sequence[Mapping[str, Any]]) -> str:
    rows, never_above, compared = [], 0, 0
    roads = ("drop", "hoist", "wide")
    for row in found:
        cells = [f"{row['saved']:.0%}", f"{row['most_ms']:.3f}"]
        cells += [
            "-" if one is None else loss(one, "refitted") for one in (*(row[name] for name in roads), row["mixed"])
        ]
        reached = [value(row[name], "refitted") for name in roads if row[name] is not None]
        if reached and row["mixed"] is not None:
            compared += 1
            never_above += value(row["mixed"], "refitted") <= min(reached)
        rows.append([*cells, "-" if row["mixed"] is None else plan_words(row["mixed"])])
    return f"""## Loss at equal predicted latency

What one decoded token takes on eight H100 with tensor parallelism, predicted as above. "-": the road does not get
there. Losses after the refit.

{table(["saved", "ms", *roads, "mixed", "the mixed plan"], rows)}

On held-out text the mixed plan's loss is at most that of the best road alone in {never_above} of {compared} rows. Plans
are chosen on the calibration text, as they are."""


def cpu_section(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            one["name"],
            f"{one['milliseconds']:.2f}",
            f"{one['intact_over_it']:.2f}x",
            "-" if "loss" not in one else f"{one['loss']:+.4f}",
        ]
        for one in found
    ]
    return f"""## Measured latency on this CPU

One token, eager mode, one thread, the fused models in their own modules, rounds interleaved; "control" is the intact
model against itself. The number behind a road is its FFN depth. The CPU was shared: compare with the control.

![loss after refit against measured latency](figures/roads_cpu.svg)

{table(["model", "ms", "times faster", "loss after refit"], rows)}"""


def position_section(found: Sequence[Mapping[str, Any]]) -> str:
    best = {
        road: min((one for one in found if one["road"] == road), key=lambda one: one["cost"])
        for road in dict.fromkeys(one["road"] for one in found)
    }
    words = ", ".join(f"{road} {one['first']}-{one['first'] + one['size'] - 1}" for road, one in best.items())
    return f"""## Which windows

What each window costs alone, as it is, on the text that windows are chosen on; windows over hopeless ones were not
measured. The cheapest are {words}.

![cost of each window by first layer and size](figures/roads_positions.svg)"""


def block_section(found: Mapping[str, Any]) -> str:
    rows = [
        [
            "; ".join(span(window) for window in row["windows"]),
            *(fine_cell(row[name]["loss_increase"]) for name in ("block", "wide", "hoist")),
        ]
        for row in found["rows"]
    ]
    losses = [float(row["block"]["loss_increase"]["value"]) for row in found["rows"]]
    grows = "grows" if losses == sorted(losses) else "does not grow"
    last = found["rows"][-1]
    order = sorted(("block", "wide", "hoist"), key=lambda name: float(last[name]["loss_increase"]["value"]))
    return f"""## Whole blocks in parallel (the paper's table 7)

Windows of four layers, picked greedily by the least largest, then the least summed, dependency between their blocks
(appendix B). "Block" is the paper's form, in which each block's FFN still follows its own attention; beside it the same
windows as wide blocks and hoisted, all as they are, without a refit.

{table(["windows", "block", "wide", "hoist"], rows)}

The loss {grows} with each window (in the paper it grows). With all windows, from the least loss to the most:
{", ".join(order)}. Only wide blocks and hoisted ones leave fewer and wider matrices."""


def second_section(found: Sequence[Row]) -> str:
    rows = [[f"{row['depth']:.0f}", plan_words(row), loss(row, "as_is"), loss(row, "refitted")] for row in found]
    return f"""## A second family

A GPT-2 of 12 layers (hidden 128; learned positions, LayerNorm, GELU, biases), trained for some minutes by the same
script, its attention hoisted (not part of `make results`: `python -m bench.reference.train --shape gpt2 --steps 350
--work W --output GPT2_DIR`, then `python -m bench.roads --second GPT2_DIR`):

{table(["FFNs left", "windows", "loss as it is", "loss after refit"], rows)}"""


def plan_words(row: Row) -> str:
    """`2-3 hoist; 5-8; without attention 6`"""
    words = []
    for group in row["plan"]["groups"]:
        members = group["members"] if isinstance(group, Mapping) else group
        words.append(f"{members[0]}-{members[-1]}" + (f" {group['mixers']}" if isinstance(group, Mapping) else ""))
    if row["plan"]["dropped"]:
        words.append(f"no attention in {', '.join(map(str, row['plan']['dropped']))}")
    return "; ".join(words) or "-"


def loss(row: Row, kind: str) -> str:
    return "-" if row[kind] is None else fine_cell(row[kind]["loss_increase"])


def value(row: Row, kind: str) -> float:
    return float(row[kind]["loss_increase"]["value"])


def at(rows: Sequence[Row], depth: int) -> Row | None:
    """The best row with at most so many FFNs."""
    found = [row for row in rows if row["depth"] <= depth and row["refitted"] is not None]
    return min(found, key=lambda row: value(row, "refitted"), default=None)
