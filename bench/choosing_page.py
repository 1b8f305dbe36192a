"""docs/results.md: the tables and plots of `bench.choosing`, in the shape of the paper's.

Every sentence that compares two numbers is made from the numbers, so that the page cannot say what was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.choosing_cells import Row, cell, compare, fine_cell, groups_of, span, table, value, yes
from bench.choosing_plots import plot_drop_curves, plot_planner
from bench.page_sections import put_section

DOCS = Path("docs")


def write_page(results: Mapping[str, Any], folder: Path = DOCS) -> Path:
    """Write the page and its plots."""
    plot_drop_curves(results["drop_curves"]["curves"], folder / "figures" / "drop_curves.svg")
    plot_planner(results["against_the_eye"]["rows"], folder / "figures" / "planner.svg")
    parts = [
        introduction(results),
        drop_section(results["drop_curves"]),
        dependency_section(results["dependency"]),
        intensity_section(results["intensity"]),
        ends_section(results["ends"]),
        norm_section(results["ends"], results["intensity"]),
        removal_section(results["against_removal"]),
        order_section(results["reversed_order"]),
        planner_section(results["against_the_eye"]),
        disagreements(results),
    ]
    return put_section(folder / "results.md", "choosing", "\n\n".join(parts))


def introduction(results: Mapping[str, Any]) -> str:
    text, intact = results["text"], results["intact"]
    return f"""# What dropping attention and fusing FFNs cost

Made by `make results` (`python -m bench.choosing`) on the reference model: 12 layers, hidden 256, trained on Python
source code. Choices are made on {text["calibration"] * text["tokens"]:,} calibration tokens, numbers are measured on
{text["heldout"] * text["tokens"]:,} held-out tokens. "Loss" is the increase in nats per token over the intact model on
the same tokens, with a 95 % bootstrap interval over sequences; the intact model's perplexity is
{cell(intact["perplexity"])}. The paper (arXiv 2503.18908) measures models of 49 to 253 billion parameters by MMLU and
MT-Bench; this model is 10,000 times smaller, so the signs of differences can be compared, not their sizes."""


def drop_section(found: Mapping[str, Any]) -> str:
    curves = found["curves"]
    counts = range(len(next(iter(curves.values()))))
    rows = [[count, *(cell(curve[count]["loss_increase"]) for curve in curves.values())] for count in counts]
    best = {name: sum(float(row["loss_increase"]["value"]) for row in curve) for name, curve in curves.items()}
    order = sorted(best, key=best.__getitem__)
    orders = [[name, " ".join(map(str, layers))] for name, layers in found["orders"].items()]
    return f"""## Dropping attention, by each score

![loss against the number of dropped attentions](figures/drop_curves.svg)

{table(["attentions dropped", *curves], rows)}

From the least to the most costly over the whole curve: {", ".join(order)}. The greedy order scores again after each
drop (by loss); the others rank once. Orders:

{table(["score", "layers, first dropped first"], orders)}"""


def dependency_section(found: Mapping[str, Any]) -> str:
    pictures = "\n\n".join(f"![{name}](figures/dependency_{name}.svg)" for name in found)
    rows = []
    for name, matrix in found.items():
        values = [
            matrix["values"][i][j] for i in range(len(matrix["layers"])) for j in range(i + 1, len(matrix["layers"]))
        ]
        rows.append([name, f"{min(values):.4f}", f"{sum(values) / len(values):.4f}", f"{max(values):.4f}"])
    ratio = [
        [layer, f"{found['block']['cosine'][i]:.3f}", f"{found['block']['ratio'][i]:.3f}"]
        for i, layer in enumerate(found["block"]["layers"])
    ]
    return f"""## Dependency matrices

M[i, j]: cosine distance of block j's contribution with and without block i (paper, section 3 and figure 3), for
whole blocks, for the FFNs of the intact model, and for the FFNs after a run of attentions is gone.

{pictures}

{table(["matrix", "least", "mean", "largest"], rows)}

Per block, the paper's section 5.5 (low ratio, high cosine: candidates for running in parallel):

{table(["layer", "cos(X, f(X))", "norm of h over norm of X"], ratio)}"""


def intensity_section(found: Mapping[str, Any]) -> str:
    rows = [
        [row["depth"], variant(row), groups_of(row), cell(row["perplexity"]), cell(row["loss_increase"])]
        for row in found["rows"]
    ]
    return f"""## Fusion at rising intensity (the paper's table 3)

Attention dropped from layers {span(found["dropped"])}. The paper's rule leaves the leading and the last FFN out and
cuts the rest evenly; it is shown with the paper's norm (`last`) and with each member's own norm (`fold`).

{table(["FFNs left", "variant", "groups", "perplexity", "loss"], rows)}"""


def variant(row: Row) -> str:
    return f"planner, norm={row['norm']}" if row["variant"] == "planner" else str(row["variant"])


def ends_section(found: Mapping[str, Any]) -> str:
    rows = [
        [
            row["norm"],
            yes(row["leading"]),
            yes(row["last"]),
            row["depth"],
            cell(row["perplexity"]),
            cell(row["loss_increase"]),
        ]
        for row in found["rows"]
    ]
    fold = {(row["leading"], row["last"]): row for row in found["rows"] if row["norm"] == "fold"}
    last = compare(fold[True, True], fold[True, False], "fusing the last FFN too", "leaving it out")
    first = compare(fold[True, False], fold[False, False], "fusing the leading FFN too", "leaving it out")
    return f"""## The ends of a run (the paper's table 4)

The chain {span(found["chain"])} in one FFN, with and without its leading and its last member.

{table(["norm", "leading", "last", "FFNs left", "perplexity", "loss"], rows)}

With norms folded, {last};
{first}. The paper finds that the last FFN of a run should stay
out (each variant also saves another FFN, so the rows differ in depth)."""


def norm_section(ends: Mapping[str, Any], intensity: Mapping[str, Any]) -> str:
    by_shape: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in [*ends["rows"], *intensity["rows"]]:
        if row["groups"]:
            by_shape.setdefault(tuple(map(tuple, row["groups"])), {})[row["norm"]] = row
    pairs = [(shape, found) for shape, found in by_shape.items() if len(found) == 2]
    rows = [
        [
            "; ".join(span(group) for group in shape),
            cell(found["fold"]["loss_increase"]),
            cell(found["last"]["loss_increase"]),
        ]
        for shape, found in pairs
    ]
    won = sum(value(found["fold"]) <= value(found["last"]) for _, found in pairs)
    return f"""## Own norms folded against the last norm (the paper has no such ablation)

{table(["groups", "norm=fold", "norm=last"], rows)}

Folding loses less in {won} of {len(pairs)} cases."""


def removal_section(found: Mapping[str, Any]) -> str:
    rows, won, compared = [], 0, 0
    for row in found["rows"]:
        fused = row["fused"]
        rows.append([
            row["depth"],
            "-" if fused is None else groups_of(fused),
            "-" if fused is None else cell(fused["loss_increase"]),
            " ".join(map(str, row["removed_ffns"])),
            cell(row["removed"]["loss_increase"]),
        ])  # fmt: skip
        if fused is not None:
            compared += 1
            won += value(fused) < value(row["removed"])
    return f"""## Fusing against removing FFNs (the paper's section 5.2)

The same number of FFNs left, by fusing (planner) and by removing those whose removal costs least.

{table(["FFNs left", "fused", "loss", "removed", "loss"], rows)}

Fusing costs less in {won} of {compared} rows."""


def disagreements(results: Mapping[str, Any]) -> str:
    """Where the signs differ from the paper's, and where they do not; all from the numbers above."""
    fold = {(row["leading"], row["last"]): value(row) for row in results["ends"]["rows"] if row["norm"] == "fold"}
    last = [fold[leading, True] - fold[leading, False] for leading in (False, True)]
    first = [fold[True, last_in] - fold[False, last_in] for last_in in (False, True)]
    removal = [row for row in results["against_removal"]["rows"] if row["fused"] is not None]
    fused_wins = sum(value(row["fused"]) < value(row["removed"]) for row in removal)
    turned = max(abs(value(row["reversed"]) - value(row["fused"])) for row in results["reversed_order"]["rows"])
    unfused = value(results["intensity"]["rows"][0])
    deepest = min(results["intensity"]["rows"], key=lambda row: (row["depth"], value(row)))
    found = [
        [
            "the last FFN of a run is special: fusing it costs most",
            said(min(last) > 0.01),
            f"last {last[0]:+.3f}, {last[1]:+.3f} nats (leading out, in); leading {first[0]:+.3f}, {first[1]:+.3f}",
        ],
        [
            "loss grows with the intensity of fusion",
            said(value(deepest) > unfused + 0.01),
            f"{unfused:+.3f} unfused, {value(deepest):+.3f} at {deepest['depth']} FFNs",
        ],
        [
            "fusing costs less than removing as many FFNs",
            said(fused_wins * 2 > len(removal)),
            f"fusing is better in {fused_wins} of {len(removal)} rows",
        ],
        [
            "reversing the order of FFNs costs about what fusing costs",
            said(turned < 0.05),
            f"at most {turned:.3f} nats apart",
        ],
    ]
    return f"""## Against the paper

{table(["what the paper finds", "here", "numbers"], found)}"""


def said(agrees: bool) -> str:
    return "agrees" if agrees else "**disagrees**"


def order_section(found: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['range'][0]}-{row['range'][1]}",
            cell(row["unfused"]["loss_increase"]),
            cell(row["fused"]["loss_increase"]),
            cell(row["reversed"]["loss_increase"]),
        ]
        for row in found["rows"]
    ]
    return f"""## Reverse order (the paper's table 6)

The FFNs of a run one behind the other in reverse order, against the same FFNs fused. The paper finds both about alike.

{table(["layers", "in order", "fused", "reversed"], rows)}"""


def planner_section(found: Mapping[str, Any]) -> str:
    rows = [
        [
            row["depth"],
            span(row["dropped"]),
            groups_of(row["paper"]),
            cell(row["paper"]["loss_increase"]),
            groups_of(row["planner"]),
            row["planner"]["norm"],
            cell(row["planner"]["loss_increase"]),
            "same plan" if same_plan(row) else fine_cell(row["difference"]),
        ]
        for row in found["rows"]
    ]
    return f"""## The planner against the paper's rule at equal depth

For several sets of dropped attentions, at each depth that the paper's rule reaches: both fuse the same model to the
same number of FFNs. Chosen on calibration text, measured on held-out text. The paper's rule (even cuts, the ends out,
norm=last) is the planner's first proposal, and it departs from it only where the paired interval on the calibration
text says that another is better. "Difference" is the planner's loss less that of the paper's rule, paired token by
token. {planner_summary(found)}

![planner against the paper's rule](figures/planner.svg)

{table(["FFNs left", "attention dropped", "paper's rule", "loss", "planner", "norm", "loss", "difference"], rows)}"""


def planner_summary(found: Mapping[str, Any]) -> str:
    """How often the planner is better, the same and worse."""
    departed = [row["difference"] for row in found["rows"] if not same_plan(row)]
    kept = found["points"] - len(departed)
    lower = sum(difference["value"] < 0 for difference in departed)
    surely = sum(difference["high"] < 0 for difference in departed)
    worst = max((difference["value"] for difference in departed), default=0.0)
    more = f"; where it loses more, by at most {worst:.4f} nats" if worst > 0 else ""
    return f"""The planner loses less or as much at **{found["planner_lower_or_equal"]} of {found["points"]}** points.
It keeps the paper's plan at {kept}; of the other {len(departed)} it loses less at {lower} (with an interval below zero
at {surely}){more}."""


def same_plan(row: Mapping[str, Any]) -> bool:
    return all(row["planner"][name] == row["paper"][name] for name in ("groups", "norm"))
