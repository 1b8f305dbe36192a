"""`fxfusion plan MODEL`: which attention to drop or move and which FFNs to fuse, under a budget, as a plan file."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from fxfusion.planning.choice import Search
    from fxfusion.planning.request import Request
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

    Of all plans within the budget, the one with the least FFN depth (with --hardware: with the
    least predicted latency), and among those the one with the least loss. What was scored or
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
    asked = asked_for(arguments)
    target = output or run.folder.file(PLAN)
    run.check(MODEL, PLAN, COMPILED, (target, "plan"), intact=True)
    _say_drop(run, drop, arguments["drop"])
    if run.dry_run:
        return run.plan_dry_run(plan_work(run, asked, method.value), [target, COMPILED, PLANS])
    return _make(run, asked, target, method.value)


def asked_for(arguments: Arguments) -> Request:
    """Raises `OptionError` for options that contradict each other, before anything is loaded."""
    from fxfusion.planning.request import Request

    return Request.of(arguments)


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


def plan_work(run: Session, asked: Request, method: str) -> list[Work]:
    """For dry runs: the scores are needed where the layers are not named."""
    if asked.roads is not None:
        return [Work("loss of each window alone"), *([Work("refits")] if asked.after_refit else [])]
    number = asked.budget.count(len(run.mixers))
    scored = [score_work(run, method, greedy=False), score_work(run, method, greedy=True, drop=number)]
    matrices = [Work("dependency matrix of each set of dropped layers")]
    parts = [*(scored if asked.dropped_attention is None else []), *(matrices if asked.preset is None else [])]
    return [*parts, run.tried_work()]


# --- making one ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan with who made it, and where it came from."""

    plan: FusionPlan
    search: Search
    asked: Request

    @property
    def after_refit(self) -> bool:
        return bool(self.asked.after_refit)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        from fxfusion.planning.price import merged
        from fxfusion.planning.windows import WindowSearch

        search, judge = self.search, self.search.judge
        quality = {"intact model": judge.quality(fxfusion.FusionPlan()), "the plan": judge.quality(self.plan)}
        if self.after_refit:
            quality["the plan, refitted"] = search.quality(self.plan)
        windows = {"windows_measured": len(search.screen.costs)} if isinstance(search, WindowSearch) else {}
        return {
            "plan": self.plan.to_dict(),
            "depth": {"intact": judge.ffns, "plan": judge.ffns - merged(self.plan)},
            "latency_ms": self._latency(),
            "quality": {name: each.to_dict() for name, each in quality.items()},
            **windows,
            "plans_judged": len(search.found),
        }

    def _latency(self) -> dict[str, Any] | None:
        """As the cost model predicts it, where hardware is named."""
        from fxfusion.planning.price import predicted_latency

        asked = self.asked
        if asked.hardware is None:
            return None
        price = predicted_latency(self.search.judge, asked.hardware, asked.tp, asked.precision)
        words = f"{asked.hardware}, tp {asked.tp}, {asked.precision}"
        return {"hardware": words, "intact": price.of(fxfusion.FusionPlan()), "plan": price.of(self.plan)}


def choose_plan(run: Session, asked: Request, batches: Sequence[Tensor], method: Any = "loss") -> Chosen:
    """Look for the plan, with progress; what is measured is kept."""
    from fxfusion.planning.make_plan import planned

    search = new_search(run, asked, batches, method)
    return chosen_of(run, search, asked, planned(search, asked))


def new_search(run: Session, asked: Request, batches: Sequence[Tensor], method: Any = "loss") -> Search:
    """Nothing is measured yet."""
    from fxfusion.planning.make_plan import search_for

    model, scored = run.model, "scores, dependency, and the quality of every plan tried"
    what = scored if asked.roads is None else "the loss of windows, of whole plans, after their refit"
    run.screen.note(f"(choosing: {what}; Ctrl-C keeps what is measured)")
    return search_for(model, batches, asked, method, run.folder.path, progress=True)


def chosen_of(run: Session, search: Search, asked: Request, plan: FusionPlan) -> Chosen:
    """A plan with the record of how it was made."""
    from fxfusion.planning.make_plan import recorded

    return Chosen(recorded(search, plan, _command_line(), run.seed), search, asked)


def _make(run: Session, asked: Request, target: Path, method: str) -> dict[str, Any]:
    """Make the plan, keep it, print it; what `--json` prints."""
    chosen = choose_plan(run, asked, run.batches, method)
    plan, meter = chosen.plan, chosen.search.judge
    for path in dict.fromkeys((target, run.folder.file(PLAN))):
        plan.save(path, overwrite=run.overwrite)
    with run.screen.busy("measuring the plan"):
        report = _what_becomes(meter, plan)
        run.folder.write(COMPILED, report.to_dict())
        result = {**chosen.to_dict(), "fused_bytes": report.summary["packed_bytes"]}
    if set(plan.dropped_attention) == set(meter.mixers):
        warnings.warn("the plan drops every attention: tokens cannot see each other", stacklevel=2)
    result |= {"file": str(target), "text": run.text_facts}
    folder, results, file = (shlex.quote(str(path)) for path in (run.model_dir, run.results, target))
    if asked.roads is None:
        _keep_matrix(run, plan)
        _show(run, plan, report, result)
        after = [f"eval {folder} --plan {file} --results {results} --text HELD_OUT_TEXT", f"report --results {results}"]
    else:
        show_windows(run, result)
        refit = chosen.after_refit
        after = [
            f"{'refit' if refit else 'fuse'} {folder} --plan {file} --output FUSED{' --text CALIBRATION_TEXT' * refit}"
        ]
    run.screen.line(f"\nwritten: {target}; next:\n  fxfusion " + "\n  fxfusion ".join(after))
    return result


def _command_line() -> str:
    return shlex.join(["fxfusion", *sys.argv[1:]])


def _what_becomes(meter: PlanMeter, plan: FusionPlan) -> FusionReport:
    """What the compiler makes of the plan: by graph, nothing is compiled."""
    from fxfusion.analysis.planned import without_parts
    from fxfusion.compiler.pipeline import fuse_captured

    captured = without_parts(meter.graph, plan.dropped_attention, plan.removed)
    return fxfusion.FusionReport(graphs=(fuse_captured(captured, plan, verify="off").report,))


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
    _show_depth(run, result)
    line("")
    line((groups(report.main) or "no FFNs are fused: a group takes two FFNs with no attention in between") + "\n")
    show_quality(result["quality"], run.screen)


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
    if plan.removed:
        line(f"removed: layers {show_layers(plan.removed)}")
    _show_depth(run, result)
    line("")
    show_quality(result["quality"], run.screen)


def _show_depth(run: Session, result: dict[str, Any]) -> None:
    """The price of the plan: its depth, and its latency where a device is named."""
    line, latency = run.screen.line, result["latency_ms"]
    line(f"FFN depth: {result['depth']['intact']} -> {result['depth']['plan']}")
    if latency is not None:
        gain = latency["intact"] / latency["plan"]
        milliseconds = f"{latency['intact']:.4g} -> {latency['plan']:.4g} ms ({gain:.3f}x)"
        line(f"predicted latency of a token on {latency['hardware']}: {milliseconds}")
