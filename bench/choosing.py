"""The paper's tables on the reference model: what dropping attention and fusing FFNs cost, each with its interval.

    python -m bench.choosing            (make results; about ten minutes on two cores)

Choices are made on calibration text, every number is measured on held-out text, against the intact model on the same
tokens. Writes bench/results/choosing.json, its section of docs/results.md (bench/pages/choosing.md.j2, in which every
sentence that compares numbers is made from the numbers) and docs/figures/. Measurements are kept in .fxfusion_results,
so a run that was stopped goes on where it was. Source: arXiv 2503.18908.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench import show
from bench.record import record
from bench.reference import calibration_batches, heldout_batches, load_model
from bench.show import Row, value
from fxfusion import drop_attention
from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.heat_map import heat_map
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.analysis.scores import attention_scores
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.chains import ChainSearch
from fxfusion.planning.price import depth_price

METHODS = ("cosine", "loss", "kl")
RUN = 7  # attentions in a row that are dropped for the tables of the paper, whose models have long runs
CACHE = Path(".fxfusion_results")
FIGURES = show.DOCS / "figures"
say = Console(stderr=True).print


class Study:
    """The reference model, a planner on calibration text and a meter on held-out text."""

    def __init__(self, calibration: int, heldout: int) -> None:
        self.model = load_model()
        self.calibration = calibration_batches(limit=calibration)
        self.heldout = heldout_batches(limit=heldout)
        self.meter = PlanMeter(self.model, self.heldout, CACHE / f"heldout_{heldout}")
        chosen_in = CACHE / f"calibration_{calibration}"
        judge = PlanMeter(self.model, self.calibration, chosen_in)
        self.planner = ChainSearch(judge=judge, price=depth_price(judge.ffns), cache=chosen_in)

    def row(self, dropped: Sequence[int], groups: Sequence[Sequence[int]] = (), norm: Any = "fold") -> dict[str, Any]:
        """One plan, measured on held-out text."""
        plan = FusionPlan(dropped_attention=sorted(dropped), groups=groups, norm=norm)
        depth = self.meter.ffns - sum(len(group) - 1 for group in groups)
        facts = {"dropped": sorted(dropped), "groups": [list(group) for group in groups], "norm": norm, "depth": depth}
        return facts | numbers(self.meter.quality(plan))

    def run_of(self, number: int) -> tuple[int, ...]:
        """The cheapest attentions in a row (the last proposal of the planner)."""
        return self.planner.drops(number)[-1]


def numbers(quality: Quality) -> dict[str, Any]:
    """What the tables show of a measurement."""
    return {name: getattr(quality, name).to_dict() for name in ("loss_increase", "perplexity", "kl", "top1")}


def drop_curves(study: Study) -> dict[str, Any]:
    """Perplexity when attentions go one by one, in the order of each score and greedily."""
    orders: dict[str, tuple[int, ...]] = {"greedy": study.planner.first(len(study.meter.mixers))}
    scores = {}
    for method in METHODS:
        found = attention_scores(study.model, study.calibration, method, cache=CACHE / f"scores_{method}.json")
        scores[method] = found.to_dict()
        orders[method] = tuple(found.ranking)
    curves = {name: [study.row(order[:count]) for count in range(len(order) + 1)] for name, order in orders.items()}
    return {"scores": scores, "orders": {name: list(order) for name, order in orders.items()}, "curves": curves}


def dependency(study: Study) -> dict[str, Any]:
    """Both matrices of the intact model, and that of the FFNs once a run of attentions is gone."""
    found = {}
    for name, unit, dropped in (("block", "block", ()), ("ffn", "ffn", ()), ("ffn_run", "ffn", study.run_of(RUN))):
        matrix = dependency_matrix(study.model, study.calibration, unit=unit, dropped_attention=dropped)
        heat_map(matrix, FIGURES / f"dependency_{name}.svg", overwrite=True)
        found[name] = {"layers": list(matrix.layers), "dropped": list(dropped), "values": matrix.values.tolist()}
        found[name] |= {key: list(map(float, getattr(matrix, key))) for key in ("cosine", "ratio")}
    return found


def intensity(study: Study) -> dict[str, Any]:
    """Table 3: a run of FFNs fused harder and harder, by the rule of the paper and by the planner."""
    dropped = study.run_of(RUN)
    model = study.planner.without(dropped)
    rows = [{"variant": "unfused", **study.row(dropped)}]
    for depth in range(model.ffns - 1, study.planner.depths(dropped)[0] - 1, -1):
        by_eye = model.equal_cuts(depth, 1, 1)
        for norm in ("last", "fold"):
            if by_eye is not None:
                rows.append({"variant": f"paper's rule, norm={norm}", **study.row(dropped, by_eye, norm)})
        best = study.planner.try_at(dropped, depth)
        if best is not None:
            rows.append({"variant": "planner", **study.row(dropped, best.plan.groups, best.plan.norm)})
    return {"dropped": list(dropped), "rows": rows}


def ends(study: Study) -> dict[str, Any]:
    """Table 4: the whole chain in one FFN, with and without its leading and its last member."""
    dropped = study.run_of(RUN)
    chain = max(study.planner.without(dropped).chains, key=lambda found: len(found.members))
    rows = []
    for norm in ("fold", "last"):
        for leading in (False, True):
            for last in (False, True):
                group = chain.members[0 if leading else 1 : len(chain.members) - (0 if last else 1)]
                rows.append({"leading": leading, "last": last, **study.row(dropped, [group], norm)})
    return {"dropped": list(dropped), "chain": list(chain.members), "rows": rows}


def against_removal(study: Study) -> dict[str, Any]:
    """Section 5.2: fusing FFNs against removing them, for the same number of FFNs that are left."""
    dropped = study.run_of(RUN)
    rows = []
    depths = range(study.meter.ffns - 1, study.planner.depths(dropped)[0] - 1, -1)
    order = cheapest_ffns(study, dropped, len(depths))
    for depth in depths:
        best = study.planner.try_at(dropped, depth)
        removed = sorted(order[: study.meter.ffns - depth])
        fused = None if best is None else study.row(dropped, best.plan.groups, best.plan.norm)
        found = numbers(evaluate(without(study, dropped, removed), study.heldout, study.model))
        rows.append({"depth": depth, "fused": fused, "removed_ffns": removed, "removed": found})
    return {"dropped": list(dropped), "rows": rows}


def cheapest_ffns(study: Study, dropped: Sequence[int], count: int) -> list[int]:
    """FFNs whose removal, one after another, costs least on calibration text, the first removed first."""
    gone: list[int] = []
    layers = [block.layer for block in study.meter.graph.blocks.ffns]
    sample = study.calibration[:2]
    while len(gone) < count:
        left = [layer for layer in layers if layer not in gone]
        losses = {layer: float(evaluate(without(study, dropped, [*gone, layer]), sample).loss) for layer in left}
        gone.append(min(losses, key=losses.__getitem__))
    return gone


def without(study: Study, mixers: Sequence[int], ffns: Sequence[int]) -> Any:
    """Logits of the model without some attentions and FFNs."""
    graph = study.meter.graph
    removed = [*graph.blocks.mixers_of(mixers), *(block for block in graph.blocks.ffns if block.layer in ffns)]

    def logits(input_ids: Tensor) -> Tensor:
        return graph.run(input_ids, [graph.logits], removed=removed)[graph.logits]

    return logits


def reversed_order(study: Study) -> dict[str, Any]:
    """Table 6: the FFNs of a run in reverse order, one behind the other, against the same FFNs fused."""
    dropped = study.run_of(RUN)
    model = drop_attention(copy.deepcopy(study.model), dropped)
    layers = model.model.layers
    rows = []
    for first, last in ((dropped[0], dropped[-1]), (dropped[0], dropped[-2]), (dropped[1], dropped[-2])):
        order = list(range(len(layers)))
        order[first : last + 1] = reversed(order[first : last + 1])
        turned = copy.deepcopy(model)
        turned.model.layers = torch.nn.ModuleList([turned.model.layers[index] for index in order])
        members = list(range(first, last + 1))
        found = {"unfused": study.row(dropped), "fused": study.row(dropped, [members])}
        found["reversed"] = numbers(evaluate(turned, study.heldout, study.model))
        rows.append({"range": [first, last], **found})
    return {"dropped": list(dropped), "rows": rows}


def against_the_eye(study: Study) -> dict[str, Any]:
    """The planner against the paper's rule at equal depth, for several sets of dropped attentions."""
    rows = []
    for number in (3, 5, 7):
        for dropped in study.planner.drops(number):
            model = study.planner.without(dropped)
            for depth in study.planner.depths(dropped)[:-1]:
                by_eye = model.equal_cuts(depth, 1, 1)
                best = study.planner.try_at(dropped, depth)
                if by_eye is None or best is None:
                    continue
                paper = FusionPlan(dropped_attention=dropped, groups=by_eye, norm="last")
                ours = study.row(dropped, best.plan.groups, best.plan.norm)
                both = {"planner": ours, "paper": study.row(dropped, by_eye, "last")}
                difference = study.meter.difference(best.plan, paper).to_dict()
                rows.append({"dropped": list(dropped), "depth": depth, **both, "difference": difference})
    won = sum(value(one["planner"]) <= value(one["paper"]) for one in rows)
    return {"rows": rows, "points": len(rows), "planner_lower_or_equal": won}


PARTS = (drop_curves, dependency, intensity, ends, against_removal, reversed_order, against_the_eye)


# --- the section of docs/results.md -------------------------------------------------------------------

LOSS = ("loss", "loss_increase")


def variant(row: Row) -> str:
    return f"planner, norm={row['norm']}" if row["variant"] == "planner" else str(row["variant"])


def same_plan(row: Row) -> bool:
    return all(row["planner"][name] == row["paper"][name] for name in ("groups", "norm"))


def _in(name: str) -> Any:
    return lambda row: "in" if row[name] else "out"


# Headings of tables, and what they show of a row.
INTENSITY: show.Columns = [
    ("FFNs left", "depth"),
    ("variant", variant),
    ("groups", show.groups_of),
    ("perplexity", "perplexity"),
    LOSS,
]
ENDS: show.Columns = [
    ("norm", "norm"),
    ("leading", _in("leading")),
    ("last", _in("last")),
    ("FFNs left", "depth"),
    ("perplexity", "perplexity"),
    LOSS,
]
NORMS: show.Columns = {
    "groups": lambda row: show.groups_of(row["fold"]),
    "norm=fold": "fold.loss_increase",
    "norm=last": "last.loss_increase",
}
REMOVAL: show.Columns = [
    ("FFNs left", "depth"),
    ("fused", lambda row: row["fused"] and show.groups_of(row["fused"]) or "-"),
    ("loss", "fused.loss_increase"),
    ("removed", lambda row: " ".join(map(str, row["removed_ffns"]))),
    ("loss", "removed.loss_increase"),
]
REVERSED: show.Columns = {
    "layers": lambda row: f"{row['range'][0]}-{row['range'][1]}",
    "in order": "unfused.loss_increase",
    "fused": "fused.loss_increase",
    "reversed": "reversed.loss_increase",
}
PLANNER: show.Columns = [
    ("FFNs left", "depth"),
    ("attention dropped", lambda row: show.span(row["dropped"])),
    ("paper's rule", lambda row: show.groups_of(row["paper"])),
    ("loss", "paper.loss_increase"),
    ("planner", lambda row: show.groups_of(row["planner"])),
    ("norm", "planner.norm"),
    ("loss", "planner.loss_increase"),
    ("difference", lambda row: "same plan" if same_plan(row) else show.fine_cell(row["difference"])),
]


def write_page(results: Mapping[str, Any], folder: Path = show.DOCS) -> Path:
    """Write the section and its plots."""
    plot_drop_curves(results["drop_curves"]["curves"], folder / "figures" / "drop_curves.svg")
    plot_planner(results["against_the_eye"]["rows"], folder / "figures" / "planner.svg")
    return show.write_section(folder, "choosing", globals() | {"results": results, **results})


def drop_table(curves: Mapping[str, Sequence[Row]]) -> str:
    counts = range(len(next(iter(curves.values()))))
    rows = [[count, *(show.cell(curve[count]["loss_increase"]) for curve in curves.values())] for count in counts]
    return show.table(rows, ["attentions dropped", *curves], markdown=True)


def ranked(curves: Mapping[str, Sequence[Row]]) -> str:
    """Scores from the least to the most costly order."""
    return ", ".join(sorted(curves, key=lambda name: sum(map(value, curves[name]))))


def order_table(orders: Mapping[str, Sequence[int]]) -> str:
    rows = [[name, " ".join(map(str, layers))] for name, layers in orders.items()]
    return show.table(rows, ["score", "layers, first dropped first"], markdown=True)


def matrix_table(found: Mapping[str, Any]) -> str:
    rows = []
    for name, matrix in found.items():
        values = [entry for number, line in enumerate(matrix["values"]) for entry in line[number + 1 :]]
        rows.append([name, *(f"{one:.4f}" for one in (min(values), sum(values) / len(values), max(values)))])
    return show.table(rows, ["matrix", "least", "mean", "largest"], markdown=True)


def ratio_by_layer(found: Mapping[str, Any]) -> str:
    rows = zip(found["layers"], *(map("{:.3f}".format, found[name]) for name in ("cosine", "ratio")), strict=True)
    return show.table(rows, ["layer", "cos(X, f(X))", "norm of h over norm of X"], markdown=True)


def folded(ends: Mapping[str, Any]) -> dict[tuple[bool, bool], float]:
    """Loss of the chain with folded norms, by whether the leading and the last member are in."""
    return {(row["leading"], row["last"]): value(row) for row in ends["rows"] if row["norm"] == "fold"}


def end_costs(ends: Mapping[str, Any], last: bool) -> str:
    found, name = folded(ends), "last" if last else "leading"
    difference = found[True, True] - found[True, False] if last else found[True, False] - found[False, False]
    word = "costs" if difference > 0 else "gains"
    return f"fusing the {name} FFN too {word} {abs(difference):.3f} nats against leaving it out"


def norm_pairs(ends: Mapping[str, Any], intensity: Mapping[str, Any]) -> list[dict[str, Row]]:
    """Rows of the same groups with either norm."""
    by_shape: dict[str, dict[str, Row]] = {}
    for row in [*ends["rows"], *intensity["rows"]]:
        if row["groups"]:
            by_shape.setdefault(str(row["groups"]), {})[row["norm"]] = row
    return [found for found in by_shape.values() if len(found) == 2]


def wins(rows: Sequence[Mapping[str, Any]], one: str, other: str, even: bool = False) -> str:
    """How often `one` loses less than the other (or as much), where there are both."""
    pairs = [(value(row[one]), value(row[other])) for row in rows if row[one] is not None]
    return f"{sum(first < second or (even and first == second) for first, second in pairs)} of {len(pairs)}"


def planner_summary(found: Mapping[str, Any]) -> str:
    """How often the planner is better, the same and worse."""
    departed = [row["difference"] for row in found["rows"] if not same_plan(row)]
    others, kept = len(departed), found["points"] - len(departed)
    lower, surely = (sum(difference[end] < 0 for difference in departed) for end in ("value", "high"))
    worst = max((difference["value"] for difference in departed), default=0.0)
    more = f"; where it loses more, by at most {worst:.4f} nats" if worst > 0 else ""
    return f"""The planner loses less or as much at **{found["planner_lower_or_equal"]} of {found["points"]}** points.
It keeps the paper's plan at {kept}; of the other {others} it loses less at {lower} (with an interval below zero
at {surely}){more}."""


def disagreements(results: Mapping[str, Any]) -> str:
    """Where the signs differ from the paper's, and where they do not; all from the numbers above."""
    fold = folded(results["ends"])
    last = [fold[leading, True] - fold[leading, False] for leading in (False, True)]
    first = [fold[True, last_in] - fold[False, last_in] for last_in in (False, True)]
    removal, rows = results["against_removal"]["rows"], results["intensity"]["rows"]
    won, compared = map(int, wins(removal, "fused", "removed").split(" of "))
    turned = max(abs(value(row["reversed"]) - value(row["fused"])) for row in results["reversed_order"]["rows"])
    unfused, deepest = value(rows[0]), min(rows, key=lambda row: (row["depth"], value(row)))
    ends = f"last {last[0]:+.3f}, {last[1]:+.3f} nats (leading out, in); leading {first[0]:+.3f}, {first[1]:+.3f}"
    harder = f"{unfused:+.3f} unfused, {value(deepest):+.3f} at {deepest['depth']} FFNs"
    found = [
        ("the last FFN of a run is special: fusing it costs most", min(last) > 0.01, ends),
        ("loss grows with the intensity of fusion", value(deepest) > unfused + 0.01, harder),
        (
            "fusing costs less than removing as many FFNs",
            won * 2 > compared,
            f"fusing is better in {won} of {compared} rows",
        ),
        (
            "reversing the order of FFNs costs about what fusing costs",
            turned < 0.05,
            f"at most {turned:.3f} nats apart",
        ),
    ]
    said = [(what, "agrees" if agrees else "**disagrees**", how) for what, agrees, how in found]
    return show.table(said, ["what the paper finds", "here", "numbers"], markdown=True)


def plot_drop_curves(curves: Mapping[str, Sequence[Row]], path: Path) -> None:
    figure, axes = show.new_figure(x="attentions dropped", y="loss above intact [nats per token]")
    for index, (name, curve) in enumerate(curves.items()):
        xs = range(len(curve))
        axes.plot(xs, [value(row) for row in curve], "o-", ms=3, label=name, color=f"C{index}")
        low, high = ([row["loss_increase"][end] for row in curve] for end in ("low", "high"))
        axes.fill_between(xs, low, high, alpha=0.15, color=f"C{index}", linewidth=0)
    axes.set_yscale("symlog", linthresh=0.05)
    axes.legend(title="order by")
    show.save(figure, path)


def plot_planner(rows: Sequence[Row], path: Path) -> None:
    figure, axes = show.new_figure(
        x="paper's rule: loss above intact [nats]",
        y="planner: loss above intact [nats]",
        title="each point: one set of dropped attentions, one depth",
        size=(5.2, 4.8),
    )
    paper, ours = [value(row["paper"]) for row in rows], [value(row["planner"]) for row in rows]
    axes.plot(paper, ours, "o", ms=4, alpha=0.7)
    ends = [min([*paper, *ours]), max([*paper, *ours])]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    show.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=int, default=2, help="batches of 8 x 256 tokens")
    parser.add_argument("--heldout", type=int, default=4, help="batches of 8 x 256 tokens")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*every attention.*")
    FIGURES.mkdir(parents=True, exist_ok=True)
    study = Study(options.calibration, options.heldout)
    results: dict[str, Any] = {"text": {"calibration": options.calibration, "heldout": options.heldout, "tokens": 2048}}
    results["intact"] = study.row(())
    for part in PARTS:
        say(f"{part.__name__} ...", style="dim")
        results[part.__name__] = part(study)
    path = record("choosing", results)
    say(f"recorded: {path.name}; written: {write_page(results)}")


if __name__ == "__main__":
    main()
