"""What `fxfusion plan` does: choose, write the plan, say what it costs. Imported when it is used."""

from __future__ import annotations

import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.planned import without_mixers
from fxfusion.cli import evaluation_tables
from fxfusion.cli.options import show_layers
from fxfusion.cli.results_folder import COMPILED, PLAN
from fxfusion.cli.session import Session
from fxfusion.compiler.pipeline import fuse_captured
from fxfusion.plan.fusion_plan import FusionPlan, MadeBy
from fxfusion.planning.make_plan import make_plan
from fxfusion.report import FusionReport
from fxfusion.report.text import groups as group_table

if TYPE_CHECKING:
    from fxfusion.cli.plan import Wish


def make(run: Session, wish: Wish, target: Path) -> dict[str, Any]:
    """Make the plan, keep it, print it; what `--json` prints."""
    model, batches, cache = run.model, run.batches, run.folder.path
    run.screen.note(
        "(choosing: scores, dependency, and the quality of every plan tried; Ctrl-C keeps what is measured)"
    )
    plan = make_plan(
        model,
        batches,
        **asdict(wish),
        cache=cache,
        progress=True,
    )
    plan = plan.replace(made_by=MadeBy.now(command=shlex.join(["fxfusion", *sys.argv[1:]]), seed=run.common.seed))
    with run.screen.busy("measuring the plan"):
        meter = PlanMeter(model, batches, cache)
        quality = {"intact model": meter.quality(FusionPlan()), "the plan": meter.quality(plan)}
        report = what_becomes(meter, plan)
        depth = meter.ffns
    if set(plan.dropped_attention) == set(meter.mixers):
        warnings.warn("the plan drops every attention: tokens cannot see each other", stacklevel=2)
    _keep(run, plan, report, target)
    result = {
        "plan": plan.to_dict(),
        "file": str(target),
        "depth": {"intact": depth, "plan": depth - sum(len(group) - 1 for group in plan.groups)},
        "fused_bytes": report.summary["packed_bytes"],
        "quality": {name: each.to_dict() for name, each in quality.items()},
        "text": run.text_facts,
    }
    _show(run, plan, report, result)
    return result


def what_becomes(meter: PlanMeter, plan: FusionPlan) -> FusionReport:
    """What the compiler makes of the plan: by graph, nothing is compiled."""
    captured = without_mixers(meter.graph, plan.dropped_attention)
    return FusionReport(graphs=(fuse_captured(captured, plan, verify="off").report,))


def _keep(run: Session, plan: FusionPlan, report: FusionReport, target: Path) -> None:
    """The plan where it was asked for, and in the results folder with what belongs to it."""
    for path in dict.fromkeys((target, run.folder.file(PLAN))):
        plan.save(path, overwrite=run.common.overwrite)
    run.folder.write(COMPILED, report.to_dict())
    folder = run.folder.matrix("ffn", plan.dropped_attention)
    if folder.is_dir():  # the sums are there, measured on the way: the page shows the matrix
        dependency_matrix(
            run.model, run.batches, unit="ffn", dropped_attention=plan.dropped_attention, resume=folder
        ).save(folder)


def _show(run: Session, plan: FusionPlan, report: FusionReport, result: dict[str, Any]) -> None:
    line, dropped = run.screen.line, plan.dropped_attention
    line(f"attention dropped in {len(dropped)} layers{': ' if dropped else ''}{show_layers(dropped)}")
    line(f"FFNs one behind the other: {result['depth']['intact']} -> {result['depth']['plan']}\n")
    line(group_table(report.main) or "no FFNs are fused: a group takes two FFNs with no attention in between")
    line("")
    evaluation_tables.quality(result["quality"], run.screen)
    names = (run.common.model_dir, run.common.results, result["file"])
    folder, results, file = (shlex.quote(str(path)) for path in names)
    line(f"\nwritten: {result['file']}; next:")
    line(f"  fxfusion eval {folder} --plan {file} --results {results} --text HELD_OUT_TEXT")
    line(f"  fxfusion report --results {results}")
