"""Three roads to FFN Fusion on a model with all its attention: drop it, hoist it, or make it one wide block.

    python -m bench.roads            (make results; goes on where it was stopped)
    python -m bench.reference.train --shape gpt2 --steps 350 --work W --output O     (a second family, some minutes)
    python -m bench.roads --second O                                                 (checks with it, too)

Windows are chosen on calibration text; every loss is measured on held-out text, against the intact model on the same
tokens, as it is and after a refit. Writes bench/results/roads.json, a section of docs/results.md, docs/figures/.
Measurements are kept in .fxfusion_results. Source: issue 7; arXiv 2503.18908, appendix B and table 7.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.record import RESULTS, Record
from bench.reference.load import MODEL_FOLDER, calibration_batches, heldout_batches, load_model
from bench.roads_page import write_page
from bench.timing import measure, median
from bench.whole_blocks import parallel_blocks, pick_windows
from fxfusion import fuse
from fxfusion.analysis.batches import Batch
from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.cost.layer_table import LayerTable
from fxfusion.errors import PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.roads.after_refit import RefitMeter
from fxfusion.planning.roads.price import Price, depth_price, predicted_latency
from fxfusion.planning.roads.screen import Screen
from fxfusion.planning.roads.search import RoadSearch
from fxfusion.planning.roads.segment import ROADS, Road

CACHE = Path(".fxfusion_results")
DEPTHS = (10, 9, 8, 7, 6)
REFITTED_DEPTHS = (9, 8, 7)  # a refit takes far longer than a measurement
BIG = "llama-3.3-70b"  # whose layers are taken for predicted latency: as many of them as the model has
SAVED = (0.03, 0.06, 0.1)  # of the intact model's predicted latency
say = Console(stderr=True).print


class Study:
    """One model, with a search on calibration text and meters on held-out text."""

    def __init__(self, folder: Path, name: str, refit_batches: int, heldout: int) -> None:
        self.model = load_model(folder=folder)
        self.calibration = calibration_batches(limit=refit_batches, folder=folder)
        self.cache = CACHE / f"roads_{name}"
        self.heldout: list[Batch] = list(heldout_batches(limit=heldout, folder=folder))
        self.judge = PlanMeter(self.model, self.heldout, self.cache / f"heldout_{heldout}")
        self.refitted = RefitMeter(self.judge, self.calibration, self.cache / f"heldout_{heldout}")
        self.chooser = PlanMeter(self.judge.traced, self.calibration[:1], self.cache / "screen")
        self.costs: dict[Any, float] = {}

    def search(self, roads: Sequence[Road], price: Price) -> RoadSearch:
        """On the calibration text; all searches share what windows cost."""
        return RoadSearch(Screen(self.chooser, tuple(roads), max_window=5, costs=self.costs), price, self.chooser)

    def row(self, plan: FusionPlan, refit: bool = True) -> dict[str, Any]:
        """A plan on held-out text: as it is, and after a refit on the calibration text."""
        facts = {
            "plan": {"groups": [group.to_data() for group in plan.groups], "dropped": list(plan.dropped_attention)},
            "depth": depth_price(self.judge.ffns).of(plan),
            "predicted_ms": {f"tp{tp}": self.latency(tp).of(plan) for tp in (1, 8)},
            "as_is": numbers(self.judge.quality(plan)),
        }
        return facts | {"refitted": numbers(self.refitted.quality(plan)) if refit else None}

    def latency(self, tp: int) -> Price:
        if tp not in self._prices:
            self._prices[tp] = predicted_latency(self.judge, "h100", tp, "bf16", self.big)
        return self._prices[tp]

    @cached_property
    def _prices(self) -> dict[int, Price]:
        return {}

    @cached_property
    def big(self) -> LayerTable:
        """As many layers as the model has, of a size for which tensor parallelism is used."""
        table = LayerTable.published(BIG)
        return table.model_copy(update={"layers": table.layers[: self.judge.ffns], "fused_slots": {}})


def numbers(quality: Quality) -> dict[str, Any]:
    return {name: getattr(quality, name).to_dict() for name in ("loss_increase", "perplexity", "kl", "top1")}


def fronts(study: Study) -> dict[str, Any]:
    """For each road and all together, the plan chosen at each FFN depth."""
    found: dict[str, list[dict[str, Any]]] = {}
    searches = all_searches(study, depth_price(study.judge.ffns))
    for name, search in searches.items():
        if name == "mixed":
            for road in ROADS:
                search.found.update(searches[road].found)
        for depth in DEPTHS:
            say(f"  {name}, {depth} FFNs", style="dim")
            try:
                plan = search.best_at(depth).plan
            except PlanError as error:
                say(f"  {error}", style="dim")
                continue
            found.setdefault(name, []).append({"asked": depth, **study.row(plan, depth in REFITTED_DEPTHS)})
    return found


def all_searches(study: Study, price: Price) -> dict[str, RoadSearch]:
    """One for each road, and one for several; that comes last, and is told what the others tried."""
    return {**{road: study.search((road,), price) for road in ROADS}, "mixed": study.search(ROADS, price)}


def equal_latency(study: Study, tp: int = 8) -> list[dict[str, Any]]:
    """At equal predicted latency: the best plan of each road alone, and of all together."""
    price = study.latency(tp)
    intact = price.of(FusionPlan())
    searches = all_searches(study, price)
    rows = []
    for saved in SAVED:
        most = intact * (1 - saved)
        row: dict[str, Any] = {"saved": saved, "most_ms": most}
        for name, search in searches.items():
            if name == "mixed":
                for road in ROADS:
                    search.found.update(searches[road].found)
            row[name] = attempt(study, search, most)
        rows.append(row)
    return rows


def attempt(study: Study, search: RoadSearch, most: float) -> dict[str, Any] | None:
    """None where the road does not get there."""
    try:
        return study.row(search.best_at(most).plan)
    except PlanError:
        return None


def position_map(study: Study) -> list[dict[str, Any]]:
    """What each window costs alone, on the text that windows are chosen on."""
    return [
        {"first": one.first, "size": one.size, "road": one.road, "cost": cost}
        for one, cost in sorted(study.costs.items())
        if one.size > 1
    ]


def whole_blocks(study: Study) -> dict[str, Any]:
    """Table 7: windows of four whole blocks in parallel, picked by the dependency matrix; and other forms of them."""
    matrix = dependency_matrix(study.model, study.calibration[:1], unit="block")
    windows = pick_windows(matrix.values, 4)
    rows = []
    for count in range(1, len(windows) + 1):
        chosen = windows[:count]
        logits = parallel_blocks(study.model, chosen)
        row: dict[str, Any] = {"windows": [list(window) for window in chosen]}
        row["block"] = numbers(evaluate(logits, study.heldout, study.judge.intact()))
        for mode in ("wide", "hoist"):
            plan = FusionPlan(groups=[{"members": sorted(window), "mixers": mode} for window in chosen])
            row[mode] = numbers(study.judge.quality(plan))
        rows.append(row)
    return {"values": matrix.values.tolist(), "rows": rows}


def cpu_latency(study: Study, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Seconds of a call in eager mode on this machine, fused models in their own modules, interleaved."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    models: dict[str, Any] = {"intact": study.model, "control": study.model}
    names: dict[str, tuple[str, dict[str, Any]]] = {}
    seen: set[FusionPlan] = set()  # a mixed plan may be that of one road: the same model is timed once
    for road, found in rows.items():
        for row in found:
            plan = FusionPlan(groups=row["plan"]["groups"], dropped_attention=row["plan"]["dropped"])
            if row["asked"] in (9, 7) and row["refitted"] is not None and plan not in seen:
                seen.add(plan)
                label = f"{road} {row['asked']}"
                names[label] = (road, row)
                models[label] = fuse(load_model(), plan)
    samples = measure({name: one_token(model, ids) for name, model in models.items()}, rounds=15, threads=1)
    base = median(samples["intact"])
    return [
        {"name": name, "milliseconds": median(found).value * 1e3, "intact_over_it": base.value / median(found).value}
        | ({"loss": names[name][1]["refitted"]["loss_increase"]["value"]} if name in names else {})
        for name, found in samples.items()
    ]


def second_family(folder: Path, refit_batches: int, heldout: int) -> list[dict[str, Any]]:
    """Hoisted windows of a model of another family."""
    study = Study(folder, "second", refit_batches, heldout)
    search = study.search(("hoist",), depth_price(study.judge.ffns))
    return [study.row(search.best_at(depth).plan) for depth in (10, 9, 7)]


def known_second() -> dict[str, Any]:
    """What was found before: the model of the second family is not kept, so `make results` does not measure it anew."""
    found = Record.read("roads").results if (RESULTS / "roads.json").exists() else {}
    return {"second": found["second"]} if "second" in found else {}


def one_token(model: Any, ids: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--refit", type=int, default=8, help="calibration batches of 8 x 256 tokens for refits")
    parser.add_argument("--heldout", type=int, default=4, help="held-out batches of 8 x 256 tokens")
    parser.add_argument("--second", type=Path, help="folder of a model of a second family (bench.reference.train)")
    parser.add_argument("--only", choices=("cpu_latency",), help="measure this anew, and keep what the file has")
    options = parser.parse_args()
    study = Study(MODEL_FOLDER, "reference", options.refit, options.heldout)
    results: dict[str, Any] = {"text": {"refit": options.refit, "heldout": options.heldout, "tokens": 2048}}
    parts: dict[str, Callable[[], Any]] = {
        "fronts": lambda: fronts(study),
        "whole_blocks": lambda: whole_blocks(study),
        "positions": lambda: position_map(study),
        "cpu_latency": lambda: cpu_latency(study, results["fronts"]),
        "equal_latency": lambda: equal_latency(study),
    }
    if options.only is not None:
        results = dict(Record.read("roads").results)
        parts = {options.only: parts[options.only]}
    elif options.second is not None:
        parts["second"] = lambda: second_family(options.second, options.refit, options.heldout)
    else:
        results |= known_second()
    for name, part in parts.items():  # what is there is written at once: a run may be stopped
        say(f"{name} ...", style="dim")
        results[name] = part()
        left = tuple(other for other in parts if other not in results)
        Record.of("roads", results=results, complete=not left, left_out=left).write()
        say(f"written: {write_page(results)}")


if __name__ == "__main__":
    main()
