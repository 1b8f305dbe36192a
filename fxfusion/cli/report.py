"""`fxfusion report`: everything that is in the results folder, on one page."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import Method, show_layers, show_members
from fxfusion.cli.results_folder import (
    COMPARISON,
    COMPILED,
    MATRIX_FACTS,
    MODEL,
    PAGE,
    PLAN,
    QUALITY,
    SWEEP,
    ResultsFolder,
    broken,
    contents,
)
from fxfusion.cli.session import Run, command
from fxfusion.errors import FxFusionError
from fxfusion.files import check_file

if TYPE_CHECKING:
    from fxfusion.analysis.dependency import DependencyMatrix
    from fxfusion.plan.fusion_plan import FusionPlan
    from fxfusion.report.results import (
        Contest,
        Interval,
        Layer,
        Mixer,
        Model,
        PlanFacts,
        ProbeRow,
        QualityRow,
        Results,
        Sample,
        SpeedRow,
        SweepPoint,
    )

PageOutput = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="The page.", show_default="report.html in --results")
]
Title = Annotated[str, typer.Option(help="Heading of the page.")]

Found = Mapping[str, Any]
T = TypeVar("T")

_MEASURES = ("loss", "perplexity", "kl", "top1", "top5")
_COMPARED = ("perplexity", "loss_increase", "kl", "top1")
_UNITS = ("ffn", "block")


@command
def report(
    run: Run,
    results: options.Results = Path("fxfusion_results"),
    output: PageOutput = None,
    title: Title = "fxfusion results",
) -> dict[str, Any]:
    """Write one HTML page of all results: layers, dependency, plan, refusals, quality, speed.

    The page needs nothing else: no network, no other file. What was not measured yet is named on it.
    """
    if not results.is_dir():
        raise FxFusionError(f"--results {results}: no such folder; fxfusion score, plan or eval make it")
    page = output or results / PAGE
    known = [path for path in results.iterdir() if path.name != PAGE]
    check_file(page, "results page", overwrite=run.overwrite, reads=known)
    from fxfusion.report.results_page import write_results_page

    found = collect(ResultsFolder(results))
    path = write_results_page(found, page, title, overwrite=run.overwrite)
    run.screen.line(f"written: {path}")
    return {"page": str(path), "results": found.to_dict()}


def collect(folder: ResultsFolder) -> Results:
    """Everything that is there. Raises `FxFusionError` where nothing is, or a file is broken."""
    from fxfusion.analysis.heat_map import for_page
    from fxfusion.report.results import Results

    latest = _part(folder, QUALITY, lambda found: found["latest"]) or {}
    plan, text = _read_plan(folder, latest)
    method, scores = _scores(folder, plan)
    matrices = _matrices(folder, plan)
    results = Results(
        model=_part(folder, MODEL, _model),
        layers=_part(folder, MODEL, lambda found: _layers(found, plan, scores, matrices)) or (),
        score_method=method,
        matrix=for_page(matrices[0]) if matrices else None,
        plan=None if plan is None else _plan(plan, text),
        report=_part(folder, COMPILED, fxfusion.FusionReport.from_dict),
        quality=_part(folder, QUALITY, lambda _: _quality(latest)) or (),
        probes=_part(folder, QUALITY, lambda _: _probes(latest)) or (),
        speed=_part(folder, QUALITY, lambda _: _speed(latest)) or (),
        sweep=_part(folder, SWEEP, _sweep) or (),
        comparison=_part(folder, COMPARISON, _comparison),
        samples=_part(folder, QUALITY, lambda _: _samples(latest)) or (),
        notes=_notes(latest, plan, folder),
    )
    if results == Results():
        raise FxFusionError(
            f"{folder.path} holds no results; fxfusion score, matrix, plan, eval, sweep and compare make them"
        )
    return results


def _part(folder: ResultsFolder, name: str, read: Callable[[dict[str, Any]], T]) -> T | None:
    """What `read` makes of a file; None where it is not there. Raises `FxFusionError` where it holds something else."""
    found = folder.read(name)
    if found is None:
        return None
    try:
        return read(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise broken(folder.file(name), f"{type(error).__name__}: {error}") from error


def _model(found: Found) -> Model:
    from fxfusion.report.results import Model

    facts = found["facts"]
    return Model(
        name=found["name"],
        architecture=facts["architecture"],
        layers=facts["layers"],
        hidden=facts["hidden"],
        vocabulary=facts["vocabulary"],
        parameters=found["parameters"],
    )


def _scores(folder: ResultsFolder, plan: FusionPlan | None) -> tuple[str, dict[int, Interval]]:
    """Of the method that the plan was made by, else of any: its name, and the scores by layer."""
    from fxfusion.report.results import Interval

    methods = [method.value for method in (Method.loss, Method.kl, Method.cosine)]
    if plan is not None and plan.scores is not None and plan.scores.method in methods:
        methods.sort(key=lambda method: method != plan.scores.method)  # type: ignore[union-attr]
    for method in methods:
        for greedy in (False, True):
            found = _part(folder, folder.scores(method, greedy), _intervals)
            if found is not None:
                return method, found
    if plan is None or plan.scores is None:
        return "", {}
    return plan.scores.method, {score.layer: Interval(score.value) for score in plan.scores.values}


def _intervals(found: Found) -> dict[int, Interval]:
    return {score["layer"]: _interval(score) for score in found["scores"]}


def _matrices(folder: ResultsFolder, plan: FusionPlan | None) -> list[DependencyMatrix]:
    """That of the FFNs first, and of each unit that of the model under the plan first."""
    from fxfusion.analysis.dependency import DependencyMatrix

    dropped = () if plan is None else plan.dropped_attention
    places = [folder.matrix(unit, layers) for unit in _UNITS for layers in dict.fromkeys((dropped, ()))]
    return [DependencyMatrix.load(place) for place in places if (place / MATRIX_FACTS).is_file()]


def _layers(
    found: Found,
    plan: FusionPlan | None,
    scores: Mapping[int, Interval],
    matrices: Sequence[DependencyMatrix],
) -> tuple[Layer, ...]:
    from fxfusion.report.results import Layer

    dropped = set() if plan is None else {*plan.dropped_attention, *plan.removed}
    groups = {} if plan is None else {member: index for index, group in enumerate(plan.groups) for member in group}
    # The attention of a window's first layer stands first anyway.
    moved = set() if plan is None else {member for group in plan.groups if group.is_window for member in group[1:]}
    whole = next((matrix for matrix in matrices if matrix.unit == "block"), None)
    cosines = {} if whole is None else dict(zip(whole.layers, whole.cosine.tolist(), strict=True))
    ratios = {} if whole is None else dict(zip(whole.layers, whole.ratio.tolist(), strict=True))
    return tuple(
        Layer(
            number=layer["number"],
            mixer=_mixer(layer, dropped, moved),
            width=layer["width"],
            group=groups.get(layer["number"]),
            score=scores.get(layer["number"]),
            cosine=cosines.get(layer["number"]),
            ratio=ratios.get(layer["number"]),
        )
        for layer in found["layers"]
    )


def _mixer(layer: Found, dropped: Container[int], moved: Container[int | str]) -> Mixer:
    if not layer["has_mixer"]:
        return "none"
    return "dropped" if layer["number"] in dropped else "moved" if layer["number"] in moved else "kept"


def _read_plan(folder: ResultsFolder, latest: Found) -> tuple[FusionPlan | None, str]:
    """The plan and its file's text; without a file, the plan that was evaluated last."""
    file = folder.file(PLAN)
    if file.is_file():
        return fxfusion.FusionPlan.load(file), file.read_text(encoding="utf-8")
    evaluated = latest.get("plan_contents")
    return (fxfusion.FusionPlan.resolve(evaluated) if evaluated else None), ""


def _plan(plan: FusionPlan, text: str) -> PlanFacts:
    from fxfusion.report.results import PlanFacts

    made = plan.made_by
    facts = [] if made is None else [made.command, made.date]
    if made is not None and made.versions is not None:
        facts += [f"{name} {version}" for name, version in made.versions if version]
    return PlanFacts(
        dropped_attention=plan.dropped_attention,
        removed=plan.removed,
        groups=plan.groups,
        mixers=tuple(group.mixers for group in plan.groups),
        norm=plan.norm,
        made_by=", ".join(filter(None, facts)),
        yaml=text,
    )


def _quality(latest: Found) -> tuple[QualityRow, ...]:
    from fxfusion.report.results import QualityRow

    rows = []
    for name, found in latest.get("quality", {}).items():
        increase = found.get("loss_increase")  # files of earlier versions have none
        measures = {measure: _interval(found[measure]) for measure in _MEASURES}
        rows.append(QualityRow(name=name, loss_increase=increase and _interval(increase), **measures))
    return tuple(rows)


def _probes(latest: Found) -> tuple[ProbeRow, ...]:
    from fxfusion.report.results import ProbeRow

    return tuple(
        ProbeRow(name=name, solved=tuple(found["kept"].items())) for name, found in latest.get("probes", {}).items()
    )


def _comparison(found: Found) -> Contest:
    from fxfusion.report.results import Contest, Entry

    entries = []
    for cell in found["cells"]:
        quality = cell["quality"] or {}
        measures: dict[str, Any] = {name: _interval(quality[name]) for name in _COMPARED if name in quality}
        entry = Entry(
            method=cell["method"],
            depth=cell["depth"],
            refitted=cell["repaired"],
            probes=(cell["probes"] or {}).get("all"),
            **{name: cell[name] for name in ("ffns", "latency_ms", "agreement", "what", "problem")},
            **measures,
        )
        entries.append(replace(entry, best=found["best"].get(str(entry.depth)) == entry.name))
    tokens, intact = found["tokens"], found["intact"]
    return Contest(
        entries=tuple(entries),
        predicted_for=found["predicted_for"],
        ffns=intact["ffns"],
        latency_ms=intact["latency_ms"],
        tokens=(tokens["chosen_and_fitted_on"], tokens["judged_by"]),
    )


def _speed(latest: Found) -> tuple[SpeedRow, ...]:
    from fxfusion.report.results import SpeedRow

    names = {"unfused": "against the same model without fusing", "intact": "against the intact model"}
    names["baseline"] = "against the baseline"
    return tuple(
        SpeedRow(name=f"{name}, {names[other]}", ratio=_interval(ratio), control=_interval(found["control"]))
        for name, found in latest.get("speed", {}).items()
        for other, ratio in found["fused_against"].items()
    )


def _samples(latest: Found) -> tuple[Sample, ...]:
    from fxfusion.report.results import Sample

    return tuple(
        Sample(
            prompt=_text(sample, "prompt"),
            reference=_text(sample, "reference"),
            text=_text(sample, "model"),
            agreeing=sample["agreed"],
        )
        for sample in latest.get("generation", {}).get("samples", ())
    )


def _text(sample: Found, part: str) -> str:
    """Token ids where there was no tokenizer."""
    written: str | None = sample[f"{part}_text"]
    return " ".join(map(str, sample[part])) if written is None else written


def _sweep(found: Found) -> tuple[SweepPoint, ...]:
    from fxfusion.report.results import SweepPoint

    return tuple(
        SweepPoint(
            label=_label(point),
            depth=point["depth"],
            dropped=len(point["dropped_attention"]),
            fused_bytes=point["fused_bytes"],
            loss=_interval(point["quality"]["loss"]),
            perplexity=_interval(point["quality"]["perplexity"]),
            front=point["on_front"],
        )
        for point in found["points"]
    )


def _label(point: Found) -> str:
    dropped = show_layers(point["dropped_attention"]) or "none"
    groups = " ".join(f"[{show_members(group)}]" for group in point["groups"])
    if point.get("removed"):
        dropped += f"; removed {show_layers(point['removed'])}"
    return f"dropped {dropped}; {'fused ' + groups if groups else 'nothing fused'}"


def _interval(found: Found) -> Interval:
    from fxfusion.report.results import Interval

    return Interval(found["value"], found["low"], found["high"])


def _notes(latest: Found, plan: FusionPlan | None, folder: ResultsFolder) -> tuple[str, ...]:
    """What a reader should know before the numbers."""
    notes = []
    evaluated = latest.get("plan_contents")
    if latest.get("refitted"):
        notes.append(f"Quality and speed are those of the model after its refit, in {latest.get('output')}.")
    if plan is not None and evaluated is not None and evaluated != contents(plan):
        notes.append(f"The quality is that of another plan ({latest.get('plan')}) than the one shown.")
    mixers = folder.attention_layers()
    if plan is not None and mixers and set(mixers) <= set(plan.dropped_attention):
        notes.append("The plan drops every attention: tokens cannot see each other.")
    return tuple(notes)
