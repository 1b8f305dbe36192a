"""`fxfusion sweep MODEL_DIR`: what every depth costs, as a table and a plot with its Pareto front."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli import options, road_options
from fxfusion.cli.options import Method, check_folder, read, read_layers, show_layers, show_members
from fxfusion.cli.plan import tried_work
from fxfusion.cli.results_folder import MODEL, PLANS, SWEEP, SWEEP_PLOT, SWEEP_TABLE
from fxfusion.cli.score import work as score_work
from fxfusion.cli.session import Session, Work, measuring
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from fxfusion.planning.sweep import Sweep

Drops = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS",
        help="Numbers of attention layers to drop, such as 0,2,4 or 0-6.",
        show_default="six, up to half of them",
    ),
]


@measuring
def command(
    run: Session,
    limits: options.GroupLimits,
    drops: Drops = None,
    norm: options.NormOption = None,
    method: options.MethodOption = Method.loss,
    hardware: road_options.Hardware = None,
    tp: road_options.Tp = 1,
    precision: road_options.Precision = "bf16",
) -> dict[str, Any]:
    """Measure the best plan for every depth and several numbers of dropped attentions.

    Plans that no other beats in both depth and loss form the front; with --hardware also those that none beats in both
    predicted latency (decoding one sequence) and loss. Every plan is kept as soon as it is measured.
    """
    check_folder(run.common.model_dir)
    run.require_text()
    numbers = read(drops, partial(read_layers, option="--drops"))
    groups = limits.arguments()
    run.check_writes(MODEL, SWEEP, SWEEP_TABLE, SWEEP_PLOT)
    if hardware is None and (tp, precision) != (1, "bf16"):
        raise OptionError("--tp, --precision: name the --hardware that latency is predicted for")
    if run.common.dry_run:
        return run.plan_dry_run(_work(run, method.value), [SWEEP, SWEEP_TABLE, SWEEP_PLOT, PLANS])

    from fxfusion.cost import Workload
    from fxfusion.planning.sweep import sweep

    model = run.model  # first: then the folder knows its layers
    most, there = max(numbers or [0]), len(run.folder.attention_layers())
    if most > there:
        raise OptionError(f"--drops: {most} attention layers are to go, the model has {there}")
    found = sweep(
        model,
        run.batches,
        drops=numbers,
        **groups,
        norm=None if norm is None else norm.value,
        method=method.value,
        hardware=hardware,
        workload=None if hardware is None else Workload(precision=precision, tp=tp),
        cache=run.folder.path,
        progress=True,
    )
    _save(run, found)
    _show(run, found)
    return found.to_dict()


def _work(run: Session, method: str) -> list[Work]:
    return [
        score_work(run, method, greedy=False),
        score_work(run, method, greedy=True),
        Work("dependency matrix of each set of dropped layers"),
        tried_work(run),
    ]


def _save(run: Session, found: Sweep) -> None:
    run.folder.write(SWEEP, {"text": run.text_facts, **found.to_dict()})
    for name, write in ((SWEEP_TABLE, found.to_csv), (SWEEP_PLOT, found.plot)):
        write(run.folder.file(name), overwrite=run.common.overwrite)


def _show(run: Session, found: Sweep) -> None:
    rows: list[tuple[str, ...]] = []
    for point in found.points:
        plan, quality = point.measured.plan, point.measured.quality
        groups = " ".join(f"[{show_members(group)}]" for group in plan.groups)
        rows.append(
            (
                f"{point.measured.depth}{' *' if point.on_front else ''}",
                show_layers(plan.dropped_attention) or "none",
                groups or "none",
                f"{point.measured.fused_bytes / 2**20:.1f}",
                f"{float(quality.perplexity):.2f}",
                f"{float(quality.loss_increase or 0):+.4f}",
            )
        )
        if point.latency_ms is not None:
            rows[-1] += (f"{point.latency_ms:.3f}{' *' if point.on_latency_front else ''}",)
    heads = ["FFNs in a row", "attention dropped", "groups", "fused MiB", "perplexity", "loss increase"]
    heads += ["predicted ms"] * (found.points[0].latency_ms is not None)
    run.screen.table(heads, rows)
    run.screen.line(f"* on the front. The intact model has {found.intact} FFNs in a row.", "dim")
    if found.predicted_for is not None:
        run.screen.line(f"predicted for {found.predicted_for}", "dim")
    files = ", ".join(str(run.folder.file(name)) for name in (SWEEP, SWEEP_TABLE, SWEEP_PLOT))
    run.screen.line(f"written: {files}", "dim")
