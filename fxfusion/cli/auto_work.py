"""What `fxfusion auto` does: choose, refit, measure on held-out text, time, write. Imported when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxfusion.analysis.quality import Quality, evaluate, record_logits
from fxfusion.cli import evaluation_tables
from fxfusion.cli.conversion import Format
from fxfusion.cli.refit import write_refitted
from fxfusion.cli.results_folder import PLAN, contents, digest
from fxfusion.cli.road_planning import choose_plan, show
from fxfusion.cli.session import Session
from fxfusion.cost import interleaved
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.recovery.refit import refit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfusion.cli.plan import Wish

_HELD_OUT = 8  # one batch in so many
_ROUNDS = 12


def make(run: Session, wish: Wish, output: Path, format: Format) -> dict[str, Any]:
    """All of it; what `--json` prints."""
    text, held_out = divided(run.batches)
    chosen = choose_plan(run, wish, text)
    result: dict[str, Any] = {**chosen.to_dict(), "text": run.text_facts, "output": None}
    if not chosen.plan.groups and not chosen.plan.dropped_attention:
        show(run, result)
        run.screen.line("no window of layers is within the budget: nothing is written", "bold red")
        return result
    chosen.plan.save(run.folder.file(PLAN), overwrite=run.common.overwrite)
    key = digest([contents(chosen.plan), run.text_facts])
    fused = refit(
        run.model, chosen.plan, text, cache=run.folder.file(f"refit_{key}"), progress=run.screen.notes.is_terminal
    )
    with run.screen.busy("measuring on held-out text"):
        quality = _quality(run, chosen.plan, fused, held_out)
    result["quality"] = {name: each.to_dict() for name, each in quality.items()}
    with run.screen.busy("timing both models on this machine"):
        result["speed"] = _speed(run, fused, held_out[0])
    write_refitted(run, fused, chosen.plan, output, format, card={"quality": _card(quality)})
    result["output"] = str(output)
    show(run, result)
    _show_speed(run, result["speed"])
    perplexities = [float(each.perplexity) for each in quality.values()]
    run.screen.line(over_budget(chosen.budget.max_perplexity_increase, *perplexities) or "", "bold yellow")
    run.screen.line(f"written: {output} ({format.value}), plan: {run.folder.file(PLAN)}")
    return result


def over_budget(most: float | None, before: float, after: float) -> str | None:
    """What to say where held-out text does not keep the budget: it was kept on the text that plans are chosen by."""
    if most is None or after <= before * (1 + most):
        return None
    return (
        f"on held-out text perplexity is {after / before - 1:.1%} above the intact model's, more than the {most:.1%} "
        "asked for: choose by more text (--sequences), or ask for less"
    )


def divided(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Text to choose and refit with, and text that neither sees. Raises `OptionError` where there is too little."""
    if len(batches) < 3:
        raise OptionError(
            f"--text: {len(batches)} batches of text are too few to choose by, to refit to, and to measure on; give "
            "more text, or smaller batches (--batch)"
        )
    held_out = list(batches[::_HELD_OUT])
    return [batch for number, batch in enumerate(batches) if number % _HELD_OUT], held_out


def _quality(run: Session, plan: FusionPlan, fused: PreTrainedModel, held_out: list[Tensor]) -> dict[str, Quality]:
    reference = record_logits(run.model, held_out)
    return {
        "intact model": evaluate(run.model, held_out, reference),
        "fused and refitted": evaluate(fused, held_out, reference),
    }


def _speed(run: Session, fused: PreTrainedModel, batch: Tensor) -> dict[str, Any]:
    """Both models in eager mode, interleaved, with the intact model against itself as control."""
    found = {}
    for name, tokens in (("a prompt", batch.shape[1]), ("one token", 1)):
        ids = batch[:1, :tokens].to(run.device)
        calls = {label: _call(model, ids) for label, model in (("intact", run.model), ("fused", fused))}
        with torch.no_grad():
            samples = interleaved.sample({**calls, "control": calls["intact"]}, _ROUNDS, run.common.seed)
        found[name] = {
            "tokens": tokens,
            "milliseconds": {label: interleaved.median(samples[label]) * 1e3 for label in calls},
            "faster": interleaved.ratio(samples["intact"], samples["fused"]).to_dict(),
            "control": interleaved.ratio(samples["intact"], samples["control"]).to_dict(),
        }
    return found


def _call(model: PreTrainedModel, ids: Tensor) -> Any:
    def call() -> None:
        model(input_ids=ids, use_cache=False)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)

    return call


def _show_speed(run: Session, found: dict[str, Any]) -> None:
    rows = [
        (
            f"{name} ({one['tokens']} tokens)" if one["tokens"] > 1 else name,
            *(f"{milliseconds:.2f}" for milliseconds in one["milliseconds"].values()),
            str(interleaved.Ratio(**one["faster"])),
            str(interleaved.Ratio(**one["control"])),
        )
        for name, one in found.items()
    ]
    run.screen.line("")
    run.screen.table(("on this machine, eager", "intact [ms]", "fused [ms]", "times faster", "control"), rows)


def _card(quality: dict[str, Quality]) -> dict[str, str]:
    """What the model card says."""
    return {
        f"{measure}, {name}": evaluation_tables.number(getattr(found, measure).to_dict(), 4)
        for name, found in quality.items()
        for measure in ("perplexity", "kl", "top1")
    }
