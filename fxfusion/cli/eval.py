"""`fxfusion eval MODEL_DIR`: what a plan costs in quality, and what it gains in speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.options import Compiler, PlanFile, check_folder
from fxfusion.cli.results_folder import COMPILED, MODEL, PLAN, QUALITY
from fxfusion.cli.session import Session, Work, measuring
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from fxfusion.plan.fusion_plan import FusionPlan

Baseline = Annotated[
    Path | None, typer.Option(help="Folder of the model to compare with.", show_default="the model itself, intact")
]
CompilerOption = Annotated[
    Compiler, typer.Option("--compiler", help="What compiles the fused graph; inductor needs a C++ compiler.")
]
Generate = Annotated[int, typer.Option(min=0, help="Also continue so many prompts greedily, and compare the texts.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of these continuations.")]
Speed = Annotated[bool, typer.Option("--speed", help="Also time the fused model against the unfused one.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK", help="Also run a task of lm-eval; may be repeated.", show_default=False),
]
TaskFolder = Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.", show_default=False)]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="Examples per task at most.", show_default=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What to measure beside quality. `generate`: number of prompts, 0 for none."""

    generate: int
    new_tokens: int
    speed: bool
    tasks: tuple[str, ...]
    task_folder: Path | None
    task_limit: int | None


@measuring
def command(
    run: Session,
    plan: PlanFile = None,
    baseline: Baseline = None,
    compiler: CompilerOption = Compiler.inductor,
    generate: Generate = 0,
    new_tokens: NewTokens = 64,
    speed: Speed = False,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    task_limit: TaskLimit = None,
) -> dict[str, Any]:
    """Measure what a plan costs: perplexity, KL, agreement, text; each with its 95 % interval and a control.

    The attention that the plan drops is dropped, the model is compiled with the plan's groups, and everything
    is compared with the intact model on the same text. Without --plan the intact model is measured alone.
    """
    run.require_text()
    parts = Parts(
        generate=generate,
        new_tokens=new_tokens,
        speed=speed,
        tasks=tuple(tasks or ()),
        task_folder=task_folder,
        task_limit=task_limit,
    )
    chosen = _read_plan(run, plan)
    for folder in filter(None, (run.common.model_dir, baseline)):
        check_folder(folder)
    run.check_writes(MODEL, QUALITY, COMPILED, reads=[plan, baseline])
    if speed and not chosen.groups:
        raise OptionError("--speed: there is nothing fused to time; give a --plan with groups")
    if run.common.dry_run:
        return run.plan_dry_run(_work(chosen, baseline, parts), [QUALITY])

    from fxfusion.cli.evaluation import Evaluation
    from fxfusion.cli.evaluation_tables import show

    result = Evaluation(run=run, plan=chosen, compiler=compiler.value, baseline=baseline).measure(parts, plan)
    show(result, run.screen)
    run.screen.line(
        f"\nkept in {run.folder.file(QUALITY)}; fxfusion report --results {run.folder.path} shows it", "dim"
    )
    return result


def _read_plan(run: Session, file: Path | None) -> FusionPlan:
    from fxfusion.plan.fusion_plan import FusionPlan

    if file is not None:
        return FusionPlan.load(file)
    if run.folder.file(PLAN).is_file():
        run.screen.note(f"there is a plan in {run.folder.file(PLAN)}; give it by --plan to measure it")
    return FusionPlan()


def _work(plan: FusionPlan, baseline: Path | None, parts: Parts) -> list[Work]:
    found = [Work("the reference, and itself again as control", 2)]
    found += [Work("the model of MODEL_DIR", 1)] if baseline is not None else []
    dropped, groups = len(plan.dropped_attention), len(plan.groups)
    found += [Work(f"without the attention of {dropped} layers", 1)] if dropped else []
    found += [Work(f"compiled with {groups} group{'s' if groups > 1 else ''}", 1)] if groups else []
    found += [Work(f"two continuations of {parts.generate} prompts")] if parts.generate else []
    found += [Work("timing, fused and unfused")] if parts.speed else []
    return found + [Work(f"task {task}") for task in parts.tasks]
