"""The paper's tables on the reference model: what dropping attention and fusing FFNs cost, each with its interval.

    python -m bench.choosing            (make results; about ten minutes on two cores)

Choices are made on calibration text, every number is measured on held-out text, against the intact model on the same
tokens. Writes bench/results/choosing.json, docs/results.md and docs/figures/. Measurements are kept in
.fxfusion_results, so a run that was stopped goes on where it was. Source: issue 3; arXiv 2503.18908.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.choosing_page import write_page
from bench.record import record
from bench.reference.load import calibration_batches, heldout_batches, load_model
from fxfusion import drop_attention
from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.heat_map import heat_map
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.analysis.scores import attention_scores
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.candidates import equal_cuts
from fxfusion.planning.planner import Planner

METHODS = ("cosine", "loss", "kl")
RUN = 7  # attentions in a row that are dropped for the tables of the paper, whose models have long runs
CACHE = Path(".fxfusion_results")
FIGURES = Path("docs/figures")
say = Console(stderr=True).print


class Study:
    """The reference model, a planner on calibration text and a meter on held-out text."""

    def __init__(self, calibration: int, heldout: int) -> None:
        self.model = load_model()
        self.calibration = calibration_batches(limit=calibration)
        self.heldout = heldout_batches(limit=heldout)
        self.meter = PlanMeter(self.model, self.heldout, CACHE / f"heldout_{heldout}")
        chosen_in = CACHE / f"calibration_{calibration}"
        self.planner = Planner(PlanMeter(self.model, self.calibration, chosen_in), cache=chosen_in)

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
    names = ("loss_increase", "perplexity", "kl", "top1")
    return {name: getattr(quality, name).to_dict() for name in names}


def drop_curves(study: Study) -> dict[str, Any]:
    """Perplexity when attentions go one by one, in the order of each score and greedily."""
    orders: dict[str, tuple[int, ...]] = {"greedy": study.planner.order}
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
        by_eye = equal_cuts(model, depth, 1, 1)
        for norm in ("last", "fold"):
            if by_eye is not None:
                rows.append({"variant": f"paper's rule, norm={norm}", **study.row(dropped, by_eye, norm)})
        best = study.planner.best_at(dropped, depth)
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
        best = study.planner.best_at(dropped, depth)
        removed = sorted(order[: study.meter.ffns - depth])
        rows.append(
            {
                "depth": depth,
                "fused": None if best is None else study.row(dropped, best.plan.groups, best.plan.norm),
                "removed_ffns": removed,
                "removed": numbers(evaluate(without(study, dropped, removed), study.heldout, study.model)),
            }
        )
    return {"dropped": list(dropped), "rows": rows}


def cheapest_ffns(study: Study, dropped: Sequence[int], count: int) -> list[int]:
    """FFNs whose removal, one after another, costs least on calibration text, the first removed first."""
    gone: list[int] = []
    layers = [block.layer for block in study.meter.graph.blocks.ffns]
    sample = study.calibration[:2]
    while len(gone) < count:
        losses = {
            layer: float(evaluate(without(study, dropped, [*gone, layer]), sample).loss)
            for layer in layers
            if layer not in gone
        }
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
        rows.append(
            {
                "range": [first, last],
                "unfused": study.row(dropped),
                "fused": study.row(dropped, [members]),
                "reversed": numbers(evaluate(turned, study.heldout, study.model)),
            }
        )
    return {"dropped": list(dropped), "rows": rows}


def against_the_eye(study: Study) -> dict[str, Any]:
    """The planner against the paper's rule at equal depth, for several sets of dropped attentions."""
    rows = []
    for number in (3, 5, 7):
        for dropped in study.planner.drops(number):
            model = study.planner.without(dropped)
            for depth in study.planner.depths(dropped)[:-1]:
                by_eye = equal_cuts(model, depth, 1, 1)
                best = study.planner.best_at(dropped, depth)
                if by_eye is None or best is None:
                    continue
                paper = FusionPlan(dropped_attention=dropped, groups=by_eye, norm="last")
                rows.append(
                    {
                        "dropped": list(dropped),
                        "depth": depth,
                        "planner": study.row(dropped, best.plan.groups, best.plan.norm),
                        "paper": study.row(dropped, by_eye, "last"),
                        "difference": study.meter.difference(best.plan, paper).to_dict(),
                    }
                )
    won = sum(one["planner"]["loss_increase"]["value"] <= one["paper"]["loss_increase"]["value"] for one in rows)
    return {"rows": rows, "points": len(rows), "planner_lower_or_equal": won}


PARTS = {
    "drop_curves": drop_curves,
    "dependency": dependency,
    "intensity": intensity,
    "ends": ends,
    "against_removal": against_removal,
    "reversed_order": reversed_order,
    "against_the_eye": against_the_eye,
}


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
    for name, part in PARTS.items():
        say(f"{name} ...", style="dim")
        results[name] = part(study)
    path = record("choosing", results)
    say(f"recorded: {path.name}; written: {write_page(results)}")


if __name__ == "__main__":
    main()
