"""`fxfusion score MODEL_DIR`: what each attention is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.options import Method, MethodOption, check_folder
from fxfusion.cli.results_folder import MEASURED, MODEL
from fxfusion.cli.session import Known, Session, Work, measuring

if TYPE_CHECKING:
    from fxfusion.analysis.scores import AttentionScores
    from fxfusion.cli.screen import Screen

Greedy = Annotated[bool, typer.Option("--greedy", help="Also drop one after the other, scoring anew after each drop.")]
_BAR = 24  # characters


@measuring
def command(run: Session, method: MethodOption = Method.loss, greedy: Greedy = False) -> dict[str, Any]:
    """Score the attention of each layer: how much the model changes without it.

    loss: increase of the next-token loss [nats]. kl: KL divergence from the intact model [nats]. cosine: how far
    it turns the residual stream, in one pass. A low score is cheap to drop.
    """
    check_folder(run.common.model_dir)
    run.require_text()
    result = run.folder.scores(method.value, greedy)
    run.check_writes(MODEL, result)
    if run.common.dry_run:
        return run.plan_dry_run([work(run, method.value, greedy)], [result])

    from fxfusion.analysis.scores import attention_scores

    scores = attention_scores(
        run.model,
        run.batches,
        method.value,
        greedy=greedy,
        cache=run.folder.file(MEASURED),
        progress=True,
        seed=run.common.seed,
    )
    run.folder.write(result, {"text": run.text_facts, **scores.to_dict()})
    show(scores, run.screen)
    run.screen.line(f"\nkept in {run.folder.path}; next: fxfusion plan, with the same --results", "dim")
    return scores.to_dict()


def work(run: Session, method: str, greedy: bool, drop: int | None = None) -> Work:
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


def show(scores: AttentionScores, screen: Screen) -> None:
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
