"""`fxfusion plan MODEL`: which attention to drop or move and which FFNs to fuse, under a budget, as a plan file."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.measure import score_work
from fxfusion.cli.options import Method, Preset, read, read_drop, read_layers, read_share, show_layers, show_members
from fxfusion.cli.results_folder import COMPILED, MODEL, PLAN, PLANS
from fxfusion.cli.screen import show_quality
from fxfusion.cli.session import Session, Work, command
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from fxfusion.analysis.meter import PlanMeter
    from fxfusion.plan.fusion_plan import FusionPlan
    from fxfusion.planning.budget import Budget, Measured
    from fxfusion.planning.roads.choose import RoadOptions
    from fxfusion.planning.roads.search import RoadSearch
    from fxfusion.report import FusionReport

Drop = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER", help="Attention layers to drop: a count (5), or a share (40% or 0.4).", show_default=False
    ),
]
MaxKl = Annotated[float | None, typer.Option(min=0, help="KL from the intact model [nats].", show_default=False)]
PresetOption = Annotated[
    Preset | None,
    typer.Option(
        "--preset",
        help="paper: each run of FFNs without its first and last one, norm last. automatic: see --automatic.",
        show_default=False,
    ),
]
Splits = Annotated[
    str | None,
    typer.Option(metavar="LAYERS", help="With --preset: layers at which a new group begins.", show_default=False),
]
PlanOutput = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="The plan file.", show_default="plan.yaml in --results"),
]
Arguments = dict[str, Any]  # of `make_plan`


@command
def plan(
    run: Session,
    limits: options.GroupLimits,
    choice: options.RoadOptions,
    drop: Drop = None,
    drop_attention: options.DropAttention = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    max_kl: MaxKl = None,
    target_depth: options.TargetDepth = None,
    norm: options.NormOption = None,
    method: options.MethodOption = Method.loss,
    preset: PresetOption = None,
    splits: Splits = None,
    automatic: options.Automatic = False,
    after_refit: options.AfterRefit = None,
    output: PlanOutput = None,
) -> dict[str, Any]:
    """Choose which attention to drop or move and which FFNs to fuse, by measurement, and write a plan file.

    Of all plans within the budget, the one with the least FFN depth (over several roads, with
    --hardware: with the least predicted latency), and among those the one with the least loss. What was scored or
    measured before with the same --results is not measured again.
    """
    if automatic and preset is not None:
        raise OptionError(f"--automatic and --preset {preset.value} were both given; give one of them")
    arguments: Arguments = {
        "drop": read(drop, read_drop, "--drop"),
        "dropped_attention": read(drop_attention, read_layers, "--drop-attention"),
        "max_perplexity_increase": read(max_perplexity_increase, read_share, "--max-perplexity-increase"),
        "max_kl": max_kl,
        "target_depth": target_depth,
        "norm": None if norm is None else norm.value,
        "method": method.value,
        "preset": "automatic" if automatic else None if preset is None else preset.value,
        "splits": read(splits, read_layers, "--splits"),
        "after_refit": after_refit,
        **limits.arguments(),
        **choice.arguments(),
    }
    _check_together(arguments)
    target = output or run.folder.file(PLAN)
    run.check(MODEL, PLAN, COMPILED, (target, "plan"))
    _say_drop(run, drop, arguments["drop"])
    if run.dry_run:
        return run.plan_dry_run(plan_work(run, arguments), [target, COMPILED, PLANS])
    return _make(run, arguments, target)


def _over_roads(given: Arguments) -> bool:
    """Whether attention may move, or the planner itself decides where it is dropped."""
    return given.get("roads") is not None or given.get("preset") == "automatic"


_BUDGETS = ("max_perplexity_increase", "max_kl", "target_depth")
_FOR_ROADS = ("after_refit", "max_window", "hardware", "max_latency")


def _check_together(given: Arguments) -> None:
    """Raises `OptionError` for options that contradict each other: `make_plan` would, but after seconds of loading."""

    def refuse(names: Sequence[str], why: str) -> None:
        wrong = next((name for name in names if given[name] is not None), None)
        if wrong is not None:
            raise OptionError(f"{wrong}: {why}")

    if _over_roads(given):
        refuse(("drop", "dropped_attention", "splits"), "over several roads the planner itself decides that")
        if given["preset"] == "paper":
            raise OptionError("--preset paper is a rule for dropped attention; it goes without --roads")
        if given["preset"] is None and all(given[name] is None for name in (*_BUDGETS, "max_latency")):
            raise OptionError(f"--roads need a budget: one of {', '.join((*_BUDGETS, 'max_latency'))}")
        if given["preset"] is None and given["hardware"] is None:
            refuse(["max_latency"], "name the --hardware that it is predicted for, such as h100")
        return
    refuse(_FOR_ROADS, "it goes with --roads or --automatic")
    if given["drop"] is not None:
        refuse(["dropped_attention"], "--drop was given, too; this names the layers itself")
    if given["preset"] is None:
        refuse(["splits"], "it goes with --preset paper: otherwise the cuts are found by measurement")
        return
    refuse([*_BUDGETS, "max_members", "max_width", "max_dependency"], "--preset is a rule that keeps no such budget")
    if given["norm"] == "fold":
        raise OptionError("--norm: --preset paper takes the norm of a group's last FFN, --norm last")


def _say_drop(run: Session, text: str | None, drop: int | float | None) -> None:
    """Which of the two it was: 1 is one layer, 1.0 are all of them."""
    if drop is None:
        return
    layers = run.mixers if run.dry_run else (run.model, run.folder.attention_layers())[1]
    from fxfusion.planning.budget import Budget

    kind = "a share" if isinstance(drop, float) else "a count"
    run.screen.note(
        f"--drop {text} is {kind}: {Budget(drop=drop).count(len(layers))} of {len(layers)} attention layers"
    )


def plan_work(run: Session, given: Arguments) -> list[Work]:
    """For dry runs: the scores are needed where the layers are not named."""
    from fxfusion.planning.budget import Budget

    if _over_roads(given):
        return [Work("loss of each window alone"), *([Work("refits")] if given["after_refit"] is not False else [])]
    number = Budget(drop=given["drop"]).count(len(run.mixers))
    method = given["method"]
    scored = [score_work(run, method, greedy=False), score_work(run, method, greedy=True, drop=number)]
    matrices = [Work("dependency matrix of each set of dropped layers")]
    parts = [*(scored if given["dropped_attention"] is None else []), *(matrices if given["preset"] is None else [])]
    return [*parts, run.tried_work()]


# --- making one ---------------------------------------------------------------------------------------


def _make(run: Session, arguments: Arguments, target: Path) -> dict[str, Any]:
    """Make the plan, keep it, print it; what `--json` prints."""
    from fxfusion.analysis.meter import PlanMeter

    if _over_roads(arguments):
        chosen = choose_plan(run, arguments, run.batches)
        plan, meter = chosen.plan, chosen.search.judge
    else:
        chosen = None
        plan, meter = _planned(run, arguments), PlanMeter(run.model, run.batches, run.folder.path)
    for path in dict.fromkeys((target, run.folder.file(PLAN))):
        plan.save(path, overwrite=run.overwrite)
    with run.screen.busy("measuring the plan"):
        report = _what_becomes(meter, plan)
        run.folder.write(COMPILED, report.to_dict())
        result = _facts(meter, plan, report) if chosen is None else chosen.to_dict()
    if set(plan.dropped_attention) == set(meter.mixers):
        warnings.warn("the plan drops every attention: tokens cannot see each other", stacklevel=2)
    result |= {"file": str(target), "text": run.text_facts}
    folder, results, file = (shlex.quote(str(path)) for path in (run.model_dir, run.results, target))
    if chosen is None:
        _keep_matrix(run, plan)
        _show(run, plan, report, result)
        after = [f"eval {folder} --plan {file} --results {results} --text HELD_OUT_TEXT", f"report --results {results}"]
    else:
        show_windows(run, result)
        refit = chosen.search.refitted is not None
        after = [
            f"{'refit' if refit else 'fuse'} {folder} --plan {file} --output FUSED{' --text CALIBRATION_TEXT' * refit}"
        ]
    run.screen.line(f"\nwritten: {target}; next:\n  fxfusion " + "\n  fxfusion ".join(after))
    return result


def _planned(run: Session, arguments: Arguments) -> FusionPlan:
    from fxfusion.plan.fusion_plan import MadeBy

    model, batches = run.model, run.batches
    run.screen.note(
        "(choosing: scores, dependency, and the quality of every plan tried; Ctrl-C keeps what is measured)"
    )
    plan = fxfusion.make_plan(model, batches, **arguments, cache=run.folder.path, progress=True)
    return plan.replace(made_by=MadeBy.now(command=_command_line(), seed=run.seed))


def _command_line() -> str:
    return shlex.join(["fxfusion", *sys.argv[1:]])


def _what_becomes(meter: PlanMeter, plan: FusionPlan) -> FusionReport:
    """What the compiler makes of the plan: by graph, nothing is compiled."""
    from fxfusion.analysis.planned import without_mixers
    from fxfusion.compiler.pipeline import fuse_captured

    captured = without_mixers(meter.graph, plan.dropped_attention)
    return fxfusion.FusionReport(graphs=(fuse_captured(captured, plan, verify="off").report,))


def _facts(meter: PlanMeter, plan: FusionPlan, report: FusionReport) -> dict[str, Any]:
    quality = {"intact model": meter.quality(fxfusion.FusionPlan()), "the plan": meter.quality(plan)}
    return {
        "plan": plan.to_dict(),
        "depth": {"intact": meter.ffns, "plan": meter.ffns - sum(len(group) - 1 for group in plan.groups)},
        "fused_bytes": report.summary["packed_bytes"],
        "quality": {name: each.to_dict() for name, each in quality.items()},
    }


def _keep_matrix(run: Session, plan: FusionPlan) -> None:
    """The sums are there, measured on the way: the page shows the matrix."""
    folder, dropped = run.folder.matrix("ffn", plan.dropped_attention), plan.dropped_attention
    if folder.is_dir():
        found = fxfusion.dependency_matrix(run.model, run.batches, unit="ffn", dropped_attention=dropped, resume=folder)
        found.save(folder)


def _show(run: Session, plan: FusionPlan, report: FusionReport, result: dict[str, Any]) -> None:
    from fxfusion.report.text import groups

    line, dropped = run.screen.line, plan.dropped_attention
    line(f"attention dropped in {len(dropped)} layers{': ' if dropped else ''}{show_layers(dropped)}")
    line(f"FFN depth: {result['depth']['intact']} -> {result['depth']['plan']}\n")
    line((groups(report.main) or "no FFNs are fused: a group takes two FFNs with no attention in between") + "\n")
    show_quality(result["quality"], run.screen)


# --- over several roads -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan with who made it, and where it came from."""

    plan: FusionPlan
    found: Measured
    search: RoadSearch
    options: RoadOptions
    budget: Budget

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        from fxfusion.planning.latency import merged

        search, judge = self.search, self.search.judge
        quality = {"intact model": judge.quality(fxfusion.FusionPlan()), "the plan": judge.quality(self.plan)}
        if search.refitted is not None:
            quality["the plan, refitted"] = self.found.quality
        return {
            "plan": self.plan.to_dict(),
            "depth": {"intact": judge.ffns, "plan": judge.ffns - merged(self.plan)},
            "latency_ms": self._latency(),
            "quality": {name: each.to_dict() for name, each in quality.items()},
            "windows_measured": len(search.screen.costs),
            "plans_judged": len(search.found),
        }

    def _latency(self) -> dict[str, Any] | None:
        """As the cost model predicts it, where hardware is named."""
        from fxfusion.planning.latency import predicted_latency

        options = self.options
        if options.hardware is None:
            return None
        price = predicted_latency(self.search.judge, options.hardware, options.tp, options.precision)
        words = f"{options.hardware}, tp {options.tp}, {options.precision}"
        return {"hardware": words, "intact": price.of(fxfusion.FusionPlan()), "plan": price.of(self.plan)}


def choose_plan(run: Session, arguments: Arguments, batches: Sequence[Tensor]) -> Chosen:
    """Look for the plan, with progress; what is measured is kept. `arguments`: of `make_plan`, some of them."""
    from fxfusion.models.fingerprint import facts_of
    from fxfusion.plan.fusion_plan import MadeBy
    from fxfusion.planning.budget import Budget, Limits
    from fxfusion.planning.make_plan import quality_record
    from fxfusion.planning.roads.choose import RoadArguments, choose, road_options, search_for

    def taken(names: Sequence[str]) -> dict[str, Any]:
        return {name: arguments.get(name) for name in names}

    budget = Budget(**taken([each.name for each in fields(Budget)]))
    limits = Limits(**taken([each.name for each in fields(Limits)]))
    given = cast(RoadArguments, taken(list(RoadArguments.__annotations__)))
    options, budget = road_options(given, budget, arguments["preset"] == "automatic")
    run.screen.note("(choosing: the loss of windows, of whole plans, after their refit; Ctrl-C keeps what is measured)")
    norm = arguments.get("norm")
    search = search_for(run.model, batches, options, budget, limits, norm, run.folder.path, progress=True)
    found = choose(search, options, budget)
    made_by = MadeBy.now(command=_command_line(), seed=run.seed)
    recorded = {"model": facts_of(run.model), "quality": quality_record(found.quality), "made_by": made_by}
    return Chosen(found.plan.replace(**recorded), found, search, options, budget)


def show_windows(run: Session, result: dict[str, Any]) -> None:
    """The windows, what they save, and what they cost."""
    line, plan = run.screen.line, fxfusion.FusionPlan.resolve(result["plan"])
    if plan.groups:
        rows = [(show_members(group), group.mixers if group.is_window else "-", len(group)) for group in plan.groups]
        run.screen.table(("layers that become one", "attention between them", "FFNs"), rows)
    else:
        line("nothing is fused: no window of layers is within the budget")
    if plan.dropped_attention:
        line(f"attention dropped: layers {show_layers(plan.dropped_attention)}")
    line(f"FFN depth: {result['depth']['intact']} -> {result['depth']['plan']}")
    latency = result["latency_ms"]
    if latency is not None:
        gain = latency["intact"] / latency["plan"]
        milliseconds = f"{latency['intact']:.4g} -> {latency['plan']:.4g} ms ({gain:.3f}x)"
        line(f"predicted latency of a token on {latency['hardware']}: {milliseconds}")
    line("")
    show_quality(result["quality"], run.screen)
