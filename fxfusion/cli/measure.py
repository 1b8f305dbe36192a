"""`fxfusion score`, `matrix` and `sweep MODEL`: what attention is worth, how much blocks depend on each other, and
what every depth costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import Method, Unit, read, read_layers, read_roads, show_layers, show_members
from fxfusion.cli.results_folder import MEASURED, MODEL, PLANS, SWEEP, SWEEP_PLOT, SWEEP_TABLE
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import Known, Session, Work, command
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from fxfusion.analysis.dependency import DependencyMatrix
    from fxfusion.analysis.scores import AttentionScores
    from fxfusion.planning.request import Request
    from fxfusion.planning.sweep import Sweep

Greedy = Annotated[bool, typer.Option("--greedy", help="Also drop one after the other, scoring anew after each drop.")]
UnitOption = Annotated[Unit, typer.Option("--unit", help="ffn: of the FFNs alone; block: of whole decoder layers.")]
Drops = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS",
        help="Numbers of attention layers to drop, such as 0,2,4 or 0-6.",
        show_default="six, up to half of them",
    ),
]
_BAR = 24  # characters
_HEAT_MAPS = ("heat_map.png", "heat_map.svg")
_SHOWN = 5  # pairs in the list of those that depend most


# --- score --------------------------------------------------------------------------------------------


@command
def score(run: Session, method: options.MethodOption = Method.loss, greedy: Greedy = False) -> dict[str, Any]:
    """Score the attention of each layer: how much the model changes without it.

    loss: increase of the next-token loss [nats]. kl: KL divergence from the intact model [nats]. cosine: how far
    it turns the residual stream, in one pass. A low score is cheap to drop.
    """
    result = run.folder.scores(method.value, greedy)
    run.check(MODEL, result)
    if run.dry_run:
        return run.plan_dry_run([score_work(run, method.value, greedy)], [result])
    scores = fxfusion.attention_scores(
        run.model,
        run.batches,
        method.value,
        greedy=greedy,
        cache=run.folder.file(MEASURED),
        progress=True,
        seed=run.seed,
    )
    run.folder.write(result, {"text": run.text_facts, **scores.to_dict()})
    show_scores(scores, run.screen)
    run.screen.line(f"\nkept in {run.folder.path}; next: fxfusion plan, with the same --results", "dim")
    return scores.to_dict()


def score_work(run: Session, method: str, greedy: bool, drop: int | None = None) -> Work:
    """For dry runs. A pass without one attention starts at its layer, so it takes about half a pass.

    `drop`: how many are dropped greedily (default: all).
    """
    count = len(run.mixers)
    passes = 1 if method == "cosine" else 1 + count
    if greedy:
        gone = count if drop is None else drop
        passes += sum(count - step for step in range(1, gone)) + gone
    found = run.folder.read(run.folder.scores(method, greedy)) or {}
    known: Known = "begun" if run.folder.file(MEASURED).exists() else ""
    if found.get("text", {}).get("digest") == run.text_facts["digest"]:
        known = "known"
    return Work(f"scores by {method}{', greedy' if greedy else ''}", passes, known)


def show_scores(scores: AttentionScores, screen: Screen) -> None:
    """By layer: score, a bar, its place when all are sorted, and its turn in greedy dropping."""
    largest = max(float(score) for score in scores.scores)
    place = {layer: number for number, layer in enumerate(scores.ranking, 1)}
    turn = {layer: number for number, layer in enumerate(scores.order, 1)}
    rows = []
    for score in scores.scores:
        value = score.value
        bar = "█" * round(_BAR * max(float(score), 0.0) / largest) if largest > 0 else ""
        mark = "cheapest" if place[score.layer] == 1 else str(place[score.layer])
        greedy = [turn.get(score.layer, "")] if scores.steps else []
        rows.append((score.layer, f"{value:.5f}", f"[{value.low:.5f}, {value.high:.5f}]", mark, *greedy, bar))
    heads = ["layer", scores.method, "95 % interval", "rank", *(["greedy turn"] if scores.steps else []), ""]
    screen.table(heads, rows, bars=True)
    screen.line(f"on {scores.tokens:,} tokens in {scores.sequences} sequences", "dim")
    if scores.steps:
        rows = [(number, step.layer, str(step.cost)) for number, step in enumerate(scores.steps, 1)]
        screen.line("")
        screen.table(("dropped", "layer", "cost of all so far [nats]"), rows)


# --- matrix -------------------------------------------------------------------------------------------


@command
def matrix(run: Session, unit: UnitOption = Unit.ffn, drop_attention: options.DropAttention = None) -> dict[str, Any]:
    """Measure how much what each block computes changes when a block before it is left out.

    FFNs that depend little on each other are cheap to fuse. Written as numbers and as a heat map (PNG and SVG).
    """
    dropped = read(drop_attention, read_layers, "--drop-attention") or []
    folder = run.folder.matrix(unit.value, dropped)
    pictures = [folder / name for name in _HEAT_MAPS]
    run.check(*((picture, "heat map") for picture in pictures))
    if run.dry_run:
        known: Known = "begun" if folder.exists() else ""
        passes = 1 + len(run.graph_without_weights.blocks.layers)
        return run.plan_dry_run([Work(f"dependency matrix ({unit.value})", passes, known)], [folder, *pictures])
    from fxfusion.analysis.heat_map import heat_map

    found = fxfusion.dependency_matrix(
        run.model, run.batches, unit=unit.value, dropped_attention=dropped, resume=folder, progress=True
    )
    found.save(folder)
    for path in pictures:
        heat_map(found, path, overwrite=run.overwrite)
    _show_pairs(run, found)
    run.screen.line(f"\nwritten: {', '.join(map(str, [folder, *pictures]))}", "dim")
    return found.to_dict()


def _show_pairs(run: Session, matrix: DependencyMatrix) -> None:
    """The pairs that depend most and least."""
    values, layers = matrix.values.tolist(), matrix.layers
    pairs = [
        (values[row][column], layers[row], layers[column])
        for row in range(len(layers))
        for column in range(row + 1, len(layers))
    ]
    pairs.sort(key=lambda pair: pair[0])
    rows = [(f"{later} on {former}", f"{value:.5f}") for value, former, later in [*pairs[:_SHOWN], *pairs[-_SHOWN:]]]
    run.screen.table(("dependency of", "cosine distance"), rows)


# --- sweep --------------------------------------------------------------------------------------------


@command
def sweep(
    run: Session,
    limits: options.GroupLimits,
    drops: Drops = None,
    norm: options.NormOption = None,
    method: options.MethodOption = Method.loss,
    hardware: options.Hardware = None,
    tp: options.Tp = 1,
    precision: options.Precision = "bf16",
    roads: options.Roads = None,
    after_refit: options.AfterRefit = None,
    max_window: options.MaxWindow = None,
) -> dict[str, Any]:
    """Measure the best plan for every depth and several numbers of dropped attentions, or over several roads.

    Plans that no other beats in both depth and loss form the front; with --hardware also those that none beats in both
    predicted latency (decoding one sequence) and loss. Every plan is kept as soon as it is measured.
    """
    from fxfusion.planning.request import Request

    arguments = {
        **limits.arguments(),
        "drops": read(drops, read_layers, "--drops"),
        "norm": None if norm is None else norm.value,
        "hardware": hardware,
        "roads": read(roads, read_roads, "--roads"),
        "after_refit": bool(after_refit),
        "max_window": max_window,
    }
    asked = Request.of({**arguments, "tp": tp, "precision": precision, "every_depth": True})
    run.check(MODEL, SWEEP, SWEEP_TABLE, SWEEP_PLOT, intact=True)
    if run.dry_run:
        return run.plan_dry_run(_sweep_work(run, asked, method.value), [SWEEP, SWEEP_TABLE, SWEEP_PLOT, PLANS])
    found = _swept(run, {**arguments, "method": method.value}, tp, precision)
    _save(run, found)
    _show_sweep(run, found)
    return found.to_dict()


def _swept(run: Session, arguments: dict[str, Any], tp: int, precision: str) -> Sweep:
    """`arguments`: of `fxfusion.sweep`. Raises `OptionError` for more layers than there are."""
    from fxfusion.cost import Workload

    model = run.model  # first: then the folder knows its layers
    most, there = max(arguments["drops"] or [0]), len(run.folder.attention_layers())
    if most > there:
        raise OptionError(f"--drops: {most} attention layers are to go, the model has {there}")
    workload = None if arguments["hardware"] is None else Workload(precision=precision, tp=tp)
    return fxfusion.sweep(model, run.batches, **arguments, workload=workload, cache=run.folder.path, progress=True)


def _sweep_work(run: Session, asked: Request, method: str) -> list[Work]:
    if asked.roads is not None:
        return [Work("loss of each window alone"), *([Work("refits")] if asked.after_refit else []), run.tried_work()]
    return [
        score_work(run, method, greedy=False),
        score_work(run, method, greedy=True),
        Work("dependency matrix of each set of dropped layers"),
        run.tried_work(),
    ]


def _save(run: Session, found: Sweep) -> None:
    run.folder.write(SWEEP, {"text": run.text_facts, **found.to_dict()})
    for name, write in ((SWEEP_TABLE, found.to_csv), (SWEEP_PLOT, found.plot)):
        write(run.folder.file(name), overwrite=run.overwrite)


def _show_sweep(run: Session, found: Sweep) -> None:
    rows: list[tuple[str, ...]] = []
    for point in found.points:
        plan, quality = point.measured.plan, point.measured.quality
        groups = " ".join(f"[{show_members(group)}{f' {group.mixers}' * group.is_window}]" for group in plan.groups)
        rows.append(
            (
                f"{point.measured.depth}{' *' if point.on_front else ''}",
                show_layers(plan.dropped_attention) or "none",
                " ".join(filter(None, [groups, f"removed {show_layers(plan.removed)}" * bool(plan.removed)])) or "none",
                f"{point.measured.fused_bytes / 2**20:.1f}",
                f"{float(quality.perplexity):.2f}",
                f"{float(quality.loss_increase or 0):+.4f}",
            )
        )
        if point.latency_ms is not None:
            rows[-1] += (f"{point.latency_ms:.3f}{' *' if point.on_latency_front else ''}",)
    heads = ["FFN depth", "attention dropped", "groups", "fused MiB", "perplexity", "loss increase"]
    heads += ["predicted ms"] * (found.points[0].latency_ms is not None)
    run.screen.table(heads, rows)
    run.screen.line(f"* on the front. The intact model has FFN depth {found.intact}.", "dim")
    if found.predicted_for is not None:
        run.screen.line(f"predicted for {found.predicted_for}", "dim")
    files = ", ".join(str(run.folder.file(name)) for name in (SWEEP, SWEEP_TABLE, SWEEP_PLOT))
    run.screen.line(f"written: {files}", "dim")
