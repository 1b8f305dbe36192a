"""Three roads to FFN Fusion on a model with all its attention: drop it, hoist it, or make it one wide block.

    python -m bench.roads            (make results; goes on where it was stopped)
    python -m bench.reference.train --shape gpt2 --steps 350 --work W --output O     (a second family, some minutes)
    python -m bench.roads --second O                                                 (checks with it, too)

Windows are chosen on calibration text; every loss is measured on held-out text, against the intact model on the same
tokens, as it is and after a refit. Writes bench/results/roads.json, a section of docs/results.md
(bench/pages/roads.md.j2, whose sentences that compare are made from the numbers), docs/figures/. Measurements are kept
in .fxfusion_results. Source: arXiv 2503.18908, appendix B (the greedy pick of windows) and table 7.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import show
from bench.choosing import CACHE, numbers, say
from bench.record import RESULTS, Interval, Record, measure, median
from bench.reference import MODEL_FOLDER, calibration_batches, heldout_batches, load_model
from bench.show import Row
from fxfusion import fuse
from fxfusion.analysis.batches import Batch
from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import evaluate
from fxfusion.cost.layer_table import LayerTable
from fxfusion.errors import PlanError
from fxfusion.models.fingerprint import decoder_layers
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.price import Price, depth_price, predicted_latency
from fxfusion.planning.request import COMPILED as ROADS
from fxfusion.planning.scores import RefitMeter, Screen
from fxfusion.planning.windows import WindowSearch

DEPTHS = (10, 9, 8, 7, 6)
REFITTED_DEPTHS = (9, 8, 7)  # a refit takes far longer than a measurement
BIG = "llama-3.3-70b"  # whose layers are taken for predicted latency: as many of them as the model has
SAVED = (0.03, 0.06, 0.1)  # of the intact model's predicted latency


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
        self.prices: dict[int, Price] = {}

    def search(self, roads: Sequence[str], price: Price) -> WindowSearch:
        """On the calibration text; all searches share what windows cost."""
        screen = Screen(self.chooser, tuple(roads), max_window=5, costs=self.costs)
        return WindowSearch(judge=self.chooser, price=price, screen=screen)

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
        """Of as many layers as the model has, of a size for which tensor parallelism is used."""
        if tp not in self.prices:
            table = LayerTable.published(BIG)
            big = table.model_copy(update={"layers": table.layers[: self.judge.ffns], "fused_slots": {}})
            self.prices[tp] = predicted_latency(self.judge, "h100", tp, "bf16", big)
        return self.prices[tp]


def fronts(study: Study) -> dict[str, Any]:
    """For each road and all together, the plan chosen at each FFN depth."""
    found: dict[str, list[dict[str, Any]]] = {}
    searches = all_searches(study, depth_price(study.judge.ffns))
    for name, search in in_turn(searches):
        for depth in DEPTHS:
            say(f"  {name}, {depth} FFNs", style="dim")
            plan = best_at(search, depth)
            if plan is not None:
                found.setdefault(name, []).append({"asked": depth, **study.row(plan, depth in REFITTED_DEPTHS)})
    return found


def all_searches(study: Study, price: Price) -> dict[str, WindowSearch]:
    """One for each road, and one for several."""
    return {**{road: study.search((road,), price) for road in ROADS}, "mixed": study.search(tuple(ROADS), price)}


def in_turn(searches: Mapping[str, WindowSearch]) -> Iterator[tuple[str, WindowSearch]]:
    """The one for several roads comes last, and is told what the others tried."""
    for name, search in searches.items():
        if name == "mixed":
            for road in ROADS:
                search.found.update(searches[road].found)
        yield name, search


def equal_latency(study: Study, tp: int = 8) -> list[dict[str, Any]]:
    """At equal predicted latency: the best plan of each road alone, and of all together."""
    price = study.latency(tp)
    searches = all_searches(study, price)
    rows = []
    for saved in SAVED:
        most = price.of(FusionPlan()) * (1 - saved)
        plans = {name: best_at(search, most) for name, search in in_turn(searches)}
        found = {name: None if plan is None else study.row(plan) for name, plan in plans.items()}
        rows.append({"saved": saved, "most_ms": most, **found})
    return rows


def best_at(search: WindowSearch, most: float) -> FusionPlan | None:
    """None where the road does not get there."""
    try:
        return search.best_at(most).plan
    except PlanError as error:
        say(f"  {error}", style="dim")
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
    """NamedWindows windows of a model of another family."""
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


# --- whole blocks in parallel --------------------------------------------------------------------------


def pick_windows(dependency: Tensor, size: int) -> list[tuple[int, ...]]:
    """Disjoint windows of `size` blocks, the most independent first: least `M_max`, then least `M_sum`, over the
    entries between its blocks (`dependency[i, j]`: how much block j changes without block i)."""
    count = len(dependency)
    windows = [tuple(range(first, first + size)) for first in range(count - size + 1)]

    def rank(window: tuple[int, ...]) -> tuple[float, float]:
        inside = dependency[window[0] : window[-1] + 1, window[0] : window[-1] + 1].triu(1)
        return float(inside.max()), float(inside.sum())

    chosen: list[tuple[int, ...]] = []
    for window in sorted(windows, key=rank):
        if not any(set(window) & set(other) for other in chosen):
            chosen.append(window)
    return chosen


class _Parallel(nn.Module):
    """Decoder layers that all read the first one's input."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total = hidden
        for block in self.blocks:
            found = block(hidden, *args, **kwargs)
            total = total + (found if isinstance(found, Tensor) else found[0]) - hidden
        return total


class _Nothing(nn.Module):
    """Stands where a layer went into a window: numbers of layers stay."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def parallel_blocks(model: nn.Module, windows: Sequence[Sequence[int]]) -> Callable[[Tensor], Tensor]:
    """Logits of the model with windows of whole blocks in parallel, in eager PyTorch. The model stays as it is."""
    memo = {id(weight): weight for weight in [*model.parameters(), *model.buffers()]}
    turned = copy.deepcopy(model, memo)
    layers = decoder_layers(turned)[1]
    for window in windows:
        blocks = [layers[layer] for layer in window]
        for layer in window:
            layers[layer] = _Nothing()
        layers[window[0]] = _Parallel(blocks)

    def logits(input_ids: Tensor) -> Tensor:
        found: Tensor = turned(input_ids=input_ids, use_cache=False).logits
        return found

    return logits


# --- the section of docs/results.md -------------------------------------------------------------------

FORMS = ("block", "wide", "hoist")
BOUNDS = {7: 0.015, 9: 0.005}  # nats after refit at these FFN depths, the goals


def plan_words(row: Row | None) -> str:
    """`2-3 hoist; 5-8; without attention 6`"""
    if row is None:
        return "-"
    words = []
    for group in row["plan"]["groups"]:
        members = group["members"] if isinstance(group, Mapping) else group
        words.append(f"{members[0]}-{members[-1]}" + (f" {group['mixers']}" if isinstance(group, Mapping) else ""))
    if row["plan"]["dropped"]:
        words.append(f"no attention in {', '.join(map(str, row['plan']['dropped']))}")
    return "; ".join(words) or "-"


def loss(row: Row | None, kind: str = "refitted") -> float:
    """Loss above the intact model [nats per token]; not a number where it was not measured."""
    found = None if row is None else row[kind]
    return float("nan") if found is None else float(found["loss_increase"]["value"])


def _loss(kind: str, *path: str) -> Callable[[Any], str]:
    """A cell: the loss of the plan at `path` of a row."""

    def shown(row: Any) -> str:
        for step in (*path, kind):
            row = None if row is None else row[step]
        return "-" if row is None else show.fine_cell(row["loss_increase"])

    return shown


SECOND: show.Columns = {
    "FFNs left": lambda row: f"{row['depth']:.0f}",
    "windows": plan_words,
    "loss as it is": _loss("as_is"),
    "loss after refit": _loss("refitted"),
}
LATENCY: show.Columns = {
    "saved": lambda row: f"{row['saved']:.0%}",
    "ms": lambda row: f"{row['most_ms']:.3f}",
    **{road: _loss("refitted", road) for road in ("drop", "hoist", "wide", "mixed")},
    "the mixed plan": lambda row: plan_words(row["mixed"]),
}
CPU: show.Columns = {
    "model": "name",
    "ms": lambda one: f"{one['milliseconds']:.2f}",
    "times faster": lambda one: f"{one['intact_over_it']:.2f}x",
    "loss after refit": lambda one: f"{one['loss']:+.4f}" if "loss" in one else "-",
}
BLOCKS: show.Columns = {
    "windows": lambda row: "; ".join(show.span(window) for window in row["windows"]),
    **{form: (lambda row, form=form: show.fine_cell(row[form]["loss_increase"])) for form in FORMS},
}


def write_page(results: Mapping[str, Any], folder: Path = show.DOCS) -> Path:
    """Write the section and its plots."""
    figures = folder / "figures"
    plot_fronts(results["fronts"], figures)
    if "cpu_latency" in results:
        plot_cpu(results["cpu_latency"], figures / "roads_cpu.svg")
    if "positions" in results:
        plot_positions(results["positions"], figures / "roads_positions.svg")
    parts = dict.fromkeys(("equal_latency", "cpu_latency", "positions", "whole_blocks", "second"))
    return show.write_section(folder, "roads", globals() | parts | dict(results))


def front_table(fronts: Mapping[str, Sequence[Row]]) -> str:
    rows = [{"road": name, **row} for name, found in fronts.items() for row in found]
    return show.columns(rows, {"road": "road", **dict(SECOND)})


def reached(fronts: Mapping[str, Sequence[Row]]) -> str:
    """The best road at each depth that is asked for, against what is asked."""
    words = []
    for depth, bound in BOUNDS.items():
        tried = {name: at(found, depth) for name, found in fronts.items()}
        values = {name: loss(row) for name, row in tried.items() if row is not None}
        best = min(values, key=values.__getitem__)
        verdict = "reached" if values[best] <= bound else "not reached"
        words.append(f"12 -> {depth} FFNs at no more than +{bound}: {verdict}, {values[best]:+.4f} ({best})")
    return "; ".join(words)


def at(rows: Sequence[Row], depth: int) -> Row | None:
    """The best row with at most so many FFNs."""
    found = [row for row in rows if row["depth"] <= depth and row["refitted"] is not None]
    return min(found, key=loss, default=None)


def never_above(found: Sequence[Row]) -> str:
    """In how many rows the mixed plan loses no more than the best road alone."""
    pairs = [([loss(row[road]) for road in ROADS if row[road] is not None], row["mixed"]) for row in found]
    compared = [loss(mixed) <= min(alone) for alone, mixed in pairs if alone and mixed is not None]
    return f"{sum(compared)} of {len(compared)}"


def cheapest(found: Sequence[Row]) -> str:
    """The window of each road that costs least."""
    words = []
    for road in dict.fromkeys(one["road"] for one in found):
        best = min((one for one in found if one["road"] == road), key=lambda one: one["cost"])
        words.append(f"{road} {best['first']}-{best['first'] + best['size'] - 1}")
    return ", ".join(words)


def losses(found: Mapping[str, Any]) -> list[float]:
    return [float(row["block"]["loss_increase"]["value"]) for row in found["rows"]]


def last_order(found: Mapping[str, Any]) -> str:
    last = found["rows"][-1]
    return ", ".join(sorted(FORMS, key=lambda form: float(last[form]["loss_increase"]["value"])))


def plot_fronts(fronts: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Loss as it is and after a refit, against FFN depth and against predicted latency."""
    axes_of = {
        "depth": ("FFNs one behind the other", lambda row: float(row["depth"])),
        "tp1": ("predicted ms for a token, one H100", lambda row: float(row["predicted_ms"]["tp1"])),
        "tp8": ("predicted ms for a token, eight H100", lambda row: float(row["predicted_ms"]["tp8"])),
    }
    for name, (label, x) in axes_of.items():
        figure, axes = show.new_figure(x=label, y="loss above intact [nats per token]")
        for kind, style in (("as_is", "--"), ("refitted", "-")):
            series: dict[str, list[show.Point]] = {}
            for road, rows in fronts.items():
                points = [(x(row), Interval(**row[kind]["loss_increase"])) for row in rows if row[kind] is not None]
                if points:
                    label = f"{road}, refitted" if kind == "refitted" else road
                    series[label] = sorted(points, key=lambda point: point[0])
            before = len(axes.containers)
            show.draw_lines(axes, series)
            for label, container in zip(series, axes.containers[before:], strict=True):
                for part in (container[0], *container[1], *container[2]):
                    part.set_color(f"C{list(fronts).index(label.removesuffix(', refitted'))}")
                container[0].set_linestyle(style)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.legend(fontsize="x-small", ncols=2)
        show.save(figure, folder / f"roads_{name}.svg")


def plot_positions(found: Sequence[Row], path: Path) -> None:
    """A heat map for each road: first layer by size; white: not measured."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    roads = list(dict.fromkeys(one["road"] for one in found))
    firsts, sizes = max(one["first"] for one in found) + 1, max(one["size"] for one in found)
    figure = Figure(figsize=(4.2 * len(roads), 3.0), layout="constrained")
    grid = figure.subplots(1, len(roads), squeeze=False)[0]
    for axes, road in zip(grid, roads, strict=True):
        values = torch.full((sizes - 1, firsts), float("nan"))
        for one in found:
            if one["road"] == road:
                values[one["size"] - 2, one["first"]] = max(one["cost"], 1e-4)
        image = axes.imshow(values.numpy(), norm=LogNorm(1e-4, 1.0), cmap="viridis", origin="lower", aspect="auto")
        axes.set_title(road, fontsize="small")
        axes.set_xlabel("first layer")
        axes.set_ylabel("layers")
        axes.set_xticks(range(firsts))
        axes.set_yticks(range(sizes - 1), range(2, sizes + 1))
    figure.colorbar(image, ax=list(grid), label="loss above intact [nats]")
    show.save(figure, path)


def plot_cpu(found: Sequence[Row], path: Path) -> None:
    words = {"x": "ms for one token on this CPU", "y": "loss after refit [nats per token]"}
    figure, axes = show.new_figure(**words, size=(6.0, 4.0))
    for one in found:
        loss = 0.0 if one["name"] == "intact" else one.get("loss")
        if loss is not None:
            place = (one["milliseconds"], loss)
            axes.plot(*place, "o", ms=5)
            axes.annotate(one["name"], place, fontsize="x-small", xytext=(4, 3), textcoords="offset points")
    show.save(figure, path)


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
