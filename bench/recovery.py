"""What a refit in closed form gives back on the reference model, and what it takes: a section of docs/results.md
(bench/pages/recovery.md.j2), whose sentences that compare numbers are made from the numbers.

    python -m bench.recovery            (make results; about half an hour on two cores)

Refitted on calibration text, measured on held-out text against the intact model on the same tokens. Every cell is kept
in .fxfusion_results, so a run that was stopped goes on. `--only PART` measures one part, `--known` nothing: it writes
page and record from what is known, and the record names what is not.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import show
from bench.choosing import CACHE, numbers
from bench.record import Interval, Record
from bench.reference import calibration_batches, heldout_batches, load_model
from bench.show import Row, value
from fxfusion import FusionPlan, drop_attention, evaluate, fuse, refit
from fxfusion.analysis.meter import PlanMeter
from fxfusion.checkpoints.quantised import linear_layers
from fxfusion.files import whole
from fxfusion.models.drop_record import read_refit
from fxfusion.models.weight_grid import WeightGrid

BUDGETS = (6, 3, 7)  # attentions of twelve that are dropped, neighbours
TOKENS = (1, 4, 8, 16, 48, 96)  # batches
SIDED = (8, 16)  # batches
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
DEEP = list(range(3, 11))  # a run that few would drop: fusing it costs ten times what the best runs cost
FUSION = (("none", 8), ("none", 48), ("none", 96), ("all", 96))  # what is refitted, and batches
LATER = ("none", "ffn", "all")
GRIDS = ("int4:32",)
TOKENS_PER_BATCH = 2048
say = Console(stderr=True).print


class Cells:
    """Measured cells by name, kept in a file. Without `measure` only what is known is given, and `left_out` fills."""

    def __init__(self, path: Path, measure: bool = True) -> None:
        self.path, self.measure = path, measure
        self.left_out: list[str] = []
        self.known: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        if name not in self.known:
            if not self.measure:
                self.left_out.append(name)
                return None
            say(f"{name} ...", style="dim")
            made = make()
            now = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}  # another process may write
            self.known = {**self.known, **now, name: made}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole(self.path) as scratch:
                scratch.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        found: dict[str, Any] = self.known[name]
        return found


Cell = dict[str, Any] | None


class Study:
    """The reference model, and measured cells."""

    def __init__(self, calibration: int, heldout: int, measure: bool = True) -> None:
        self.model = load_model()
        self.calibration, self.heldout = calibration, heldout_batches(limit=heldout)
        self.cells = Cells(CACHE / f"recovery_{heldout}.json", measure)

    def numbers(self, model: Any) -> dict[str, Any]:
        return numbers(evaluate(model, self.heldout, self.model))

    def run_of(self, number: int) -> list[int]:
        """The neighbouring attentions whose loss costs least, on two calibration batches."""

        def make() -> dict[str, Any]:
            meter = PlanMeter(self.model, calibration_batches(limit=2))
            runs = [list(range(first, first + number)) for first in range(1, len(meter.mixers) - number + 1)]
            costs = [float(meter.quality(FusionPlan(dropped_attention=run)).loss) for run in runs]
            return {"run": runs[min(range(len(runs)), key=costs.__getitem__)]}

        found = self.cells.get(f"run of {number}", make)
        return [] if found is None else list(found["run"])

    def as_it_is(self, dropped: Sequence[int], groups: Sequence[Sequence[int]]) -> Cell:
        def make() -> dict[str, Any]:
            model = copy.deepcopy(self.model)
            changed = fuse(model, plan_of(dropped, groups)) if groups else drop_attention(model, dropped)
            return self.numbers(changed)

        return self.cells.get(f"{key(dropped, groups)} as it is", make)

    def refitted(
        self,
        dropped: Sequence[int],
        groups: Sequence[Sequence[int]],
        reference: str,
        later: str = "all",
        batches: int | None = None,
        sides: str = "out",
        **more: Any,
    ) -> Cell:
        """Quality, seconds, and what was done to each layer."""
        count = batches or self.calibration
        told = {"later": later, "batches": count} | ({} if sides == "out" else {"sides": sides})
        words = " ".join(f"{name}={value}" for name, value in {**told, **more}.items())

        def make() -> dict[str, Any]:
            started = time.perf_counter()
            text = calibration_batches(limit=count)
            found = refit(self.model, plan_of(dropped, groups), text, reference, later=later, sides=sides, **more)
            seconds = time.perf_counter() - started
            done = read_refit(found.config)
            assert done is not None
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            facts = {"seconds": seconds, "peak_bytes": peak, "refit": done.model_dump(mode="json")}
            return self.numbers(found) | facts

        return self.cells.get(f"{key(dropped, groups)} {reference} {words}", make)


def plan_of(dropped: Sequence[int], groups: Sequence[Sequence[int]]) -> FusionPlan:
    return FusionPlan(dropped_attention=dropped, groups=groups)


def key(dropped: Sequence[int], groups: Sequence[Sequence[int]]) -> str:
    return f"dropped {list(dropped)} groups {[list(group) for group in groups]}"


def choices(dropped: Sequence[int]) -> dict[str, list[list[int]]]:
    """The FFNs of a run: none, the run, the run with the FFN before it, and without its last."""
    if not dropped:
        return {}
    first, last = dropped[0], dropped[-1]
    return {
        "none": [],
        "the run": [list(range(first, last + 1))],
        "with the leading": [list(range(first - 1, last + 1))],
        "without the last": [list(range(first, last))],
    }


def budgets(study: Study) -> dict[str, Any]:
    """{dropped only, fused, refitted to unfused, to intact} for each budget and choice of groups."""
    rows = []
    for number in BUDGETS:
        dropped = study.run_of(number)
        for name, groups in choices(dropped).items():
            as_it_is = study.as_it_is(dropped, groups)
            intact = study.refitted(dropped, groups, "intact")
            unfused = study.refitted(dropped, groups, "unfused") if groups else None
            if as_it_is is not None and intact is not None and (unfused is not None or not groups):
                cells = {"as_it_is": as_it_is, "unfused": unfused, "intact": intact}
                rows.append({"dropped": dropped, "choice": name, "groups": groups, **cells})
    return {"batches": study.calibration, "rows": sorted(rows, key=lambda row: len(row["dropped"]))}


def half_run(study: Study) -> tuple[list[int], list[list[int]]]:
    dropped = study.run_of(6)
    return dropped, choices(dropped)["the run"]


def _rows(name: str, cells: Mapping[Any, Cell]) -> list[dict[str, Any]]:
    return [{name: key, **cell} for key, cell in cells.items() if cell is not None]


def later(study: Study) -> dict[str, Any]:
    """The groups alone, later FFNs, attention outputs."""
    dropped, groups = half_run(study)
    cells = {one: study.refitted(dropped, groups, "intact", one, 16) for one in LATER}
    return {"dropped": dropped, "groups": groups, "batches": 16, "rows": _rows("later", cells)}


def tokens(study: Study) -> dict[str, Any]:
    """Loss against calibration tokens."""
    dropped, groups = half_run(study)
    cells = {n: study.refitted(dropped, groups, "intact", "all", n) for n in TOKENS}
    return {"dropped": dropped, "groups": groups, "rows": _rows("batches", cells)}


def penalties(study: Study) -> dict[str, Any]:
    """Loss against the penalty, one for all layers, and chosen layer by layer."""
    dropped, groups = half_run(study)
    one = partial(study.refitted, dropped, groups, "intact")
    cells = {penalty: one("all", penalties=(penalty,)) for penalty in PENALTIES} | {None: one()}
    return {"dropped": dropped, "groups": groups, "batches": study.calibration, "rows": _rows("penalty", cells)}


def sides(study: Study) -> dict[str, Any]:
    """Last layers alone, and first layers too, at two numbers of tokens."""
    dropped, groups = half_run(study)
    rows = []
    for count in SIDED:
        for side in ("out", "both"):
            cell = study.refitted(dropped, groups, "intact", "all", count, side)
            rows += [] if cell is None else [{"sides": side, "batches": count, **cell}]
    return {"dropped": dropped, "groups": groups, "rows": rows}


def fusion(study: Study) -> dict[str, Any]:
    """What fusing alone costs where it costs much, and what refits to the unfused model leave of it."""
    groups = [DEEP]
    unfused, fused = study.as_it_is(DEEP, []), study.as_it_is(DEEP, groups)
    rows = []
    for later, count in FUSION:
        cell = study.refitted(DEEP, groups, "unfused", later, count)
        if cell is not None:
            rows.append({"later": later, "batches": count, **cell})
    return {"dropped": DEEP, "groups": groups, "unfused": unfused, "fused": fused, "rows": rows}


def rounding(
    source: Any, plan: FusionPlan, text: Sequence[Any], grid: str, measure: Callable[[Any], dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """Quality of a refitted model in floating point, of the same rounded afterwards, and of one refitted on the grid;
    the last two as an export makes them."""
    on = WeightGrid.parse(grid)
    found, given = refit(source, plan, text, **more), refit(source, plan, text, grid=grid, **more)
    exported = rounded(given, on)
    changed = sum(not torch.equal(value, exported.get_parameter(name)) for name, value in given.named_parameters())
    cells = {"float": measure(found), "after": measure(rounded(found, on)), "fitted": measure(exported)}
    return {"grid": grid, "changed_by_export": changed, **cells}


def rounded(model: Any, grid: WeightGrid) -> Any:
    """A copy with the numbers that an export with this grid stores."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name in linear_layers(found):
            weight = found.get_parameter(f"{name}.weight")
            weight.copy_(grid.nearest(weight))
    return found


def on_grid(study: Study) -> dict[str, Any]:
    """Rounded afterwards, and refitted on the grid, at 4 and 8 bits."""
    rows = []
    for dropped in ([6, 7, 8], half_run(study)[0]):
        plan = plan_of(dropped, [dropped])
        text = calibration_batches(limit=16)
        for grid in GRIDS:
            make = partial(rounding, study.model, plan, text, grid, study.numbers)
            cell = study.cells.get(f"{key(dropped, [dropped])} grid {grid}", make)
            rows += [] if cell is None else [{"dropped": dropped, "groups": [dropped], **cell}]
    return {"batches": 16, "rows": rows}


def cost(study: Study) -> dict[str, Any]:
    """Seconds of a refit, and of evaluating its calibration tokens."""
    dropped, groups = half_run(study)

    def make() -> dict[str, Any]:
        text = calibration_batches(limit=16)
        started = time.perf_counter()
        evaluate(study.model, text)
        return {"seconds": time.perf_counter() - started}

    whole = study.refitted(dropped, groups, "intact", "all", 16)
    return {"batches": 16, "evaluate": study.cells.get("evaluate calibration", make), "refit": whole}


PARTS = {
    "budgets": budgets,
    "fusion": fusion,
    "later": later,
    "sides": sides,
    "tokens": tokens,
    "penalties": penalties,
    "cost": cost,
    "quantised": on_grid,
}


# --- the section of docs/results.md -------------------------------------------------------------------

REFITTED = {"none": "the groups alone", "ffn": "and every later FFN", "all": "and every later attention's output"}


def tokens_of(batches: int) -> str:
    return f"{batches * TOKENS_PER_BATCH:,}"


LATER_TABLE: show.Columns = {
    "refitted": lambda row: REFITTED[row["later"]],
    "loss": "loss_increase",
    "layers": lambda row: len(row["refit"]["fits"]),
}
SIDES_TABLE: show.Columns = {
    "refitted": lambda row: "last layers" if row["sides"] == "out" else "both sides",
    "calibration tokens": lambda row: tokens_of(row["batches"]),
    "loss": "loss_increase",
    "KL": "kl",
}
QUANTISED_TABLE: show.Columns = {
    "groups": show.groups_of,
    "grid": "grid",
    "KL in floating point": lambda row: show.fine_cell(row["float"]["kl"]),
    "rounded afterwards": lambda row: show.fine_cell(row["after"]["kl"]),
    "refitted on the grid": lambda row: show.fine_cell(row["fitted"]["kl"]),
    "less above floating point": lambda row: f"{less(row):.0%}",
}
TOKENS_TABLE: show.Columns = {"calibration tokens": lambda row: tokens_of(row["batches"]), "loss": "loss_increase"}
PENALTY_TABLE: show.Columns = {
    "penalty": lambda row: "chosen, layer by layer" if row["penalty"] is None else f"{row['penalty']:g}",
    "loss": "loss_increase",
}
BUDGETS_TABLE: show.Columns = {
    "attention dropped": lambda row: show.span(row["dropped"]),
    "FFNs fused": show.groups_of,
    "perplexity as it is": "as_it_is.perplexity",
    "loss as it is": "as_it_is.loss_increase",
    "refitted to unfused": "unfused.loss_increase",
    "refitted to intact": "intact.loss_increase",
    "perplexity then": "intact.perplexity",
}


def write_section(results: Mapping[str, Any], missing: Sequence[str] = (), folder: Path = show.DOCS) -> Path:
    """Write the section and its plot. `missing`: cells that were not measured."""
    plot_tokens(results["tokens"], folder / "figures" / "refit_tokens.svg")
    return show.write_section(folder, "recovery", globals() | dict(results) | {"missing": missing})


def brought_back(rows: Sequence[Row]) -> str:
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
            f"* attention dropped from {show.span(dropped)}: fused and refitted to the intact model loses less than "
            f"the unfused model in {below} of {len(own)} choices; the best ({show.groups_of(best)}) brings back "
            f"{1 - value(best['intact']) / cost:.0%} of the {cost:.3f} nats that dropping cost."
        )
        for row in own:
            harm = value(row["as_it_is"]) - cost
            if harm > 0.01:
                left = value(row["unfused"]) - cost
                lines.append(
                    f"* fusing {show.groups_of(row)} cost {harm:.3f} nats more; refitted to the unfused model "
                    f"{left:+.3f} are left ({1 - left / harm:.0%} removed)."
                )
    if not lines:
        return "Not all of it has been measured (`python -m bench.recovery` goes on)."
    note = "Where fusing alone cost 0.01 nats or less there is nothing to remove, and no line says so."
    return "\n".join(lines) + f"\n\n{note}"


def less(row: Row) -> float:
    """Which part of the KL that rounding afterwards adds is saved."""
    kl = {name: row[name]["kl"]["value"] for name in ("float", "after", "fitted")}
    return float((kl["after"] - kl["fitted"]) / (kl["after"] - kl["float"]))


def harm(found: Mapping[str, Any]) -> float:
    """What fusing costs beyond dropping [nats]."""
    return value(found["fused"]) - value(found["unfused"])


def _removed(found: Mapping[str, Any], row: Row) -> float:
    return 1 - (value(row) - value(found["unfused"])) / harm(found)


def most_removed(found: Mapping[str, Any]) -> str:
    return f"{max((_removed(found, row) for row in found['rows']), default=0.0):.0%}"


def fusion_table(found: Mapping[str, Any]) -> str:
    heads: show.Columns = {
        "refitted": lambda row: REFITTED[row["later"]],
        "calibration tokens": lambda row: tokens_of(row["batches"]),
        "loss above unfused": lambda row: f"{value(row) - value(found['unfused']):+.4f}",
        "removed": lambda row: f"{_removed(found, row):.0%}",
    }
    return show.columns(found["rows"], heads)


def plot_tokens(found: Mapping[str, Any], path: Path) -> None:
    figure, axes = show.new_figure(x="calibration tokens", y="loss above intact [nats per token]")
    points = [(row["batches"] * TOKENS_PER_BATCH, Interval(**row["loss_increase"])) for row in found["rows"]]
    show.draw_lines(axes, {"fused and refitted": points})
    axes.set_xscale("log")
    show.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heldout", type=int, default=8, help="batches of 8 x 256 tokens")
    parser.add_argument("--calibration", type=int, default=8, help="batches of 8 x 256 tokens, of most refits")
    parser.add_argument("--only", choices=PARTS, help="measure this anew, and keep what the file has")
    parser.add_argument("--known", action="store_true", help="measure nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*calibration tokens are few.*|.*refit is not applied.*")
    study = Study(options.calibration, options.heldout, not options.known)
    results: dict[str, Any] = {"tokens_per_batch": TOKENS_PER_BATCH, "heldout": options.heldout}
    if options.only:
        results = dict(Record.read("recovery").results)
    for name, part in PARTS.items():
        if options.only in (None, name):
            results[name] = part(study)
    missing = tuple(dict.fromkeys(study.cells.left_out))
    path = Record.of("recovery", results=results, complete=not missing, left_out=missing).write()
    say(f"recorded: {path.name}; written: {write_section(results, missing)}")


if __name__ == "__main__":
    main()
