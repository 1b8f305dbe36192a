"""`fxfusion auto MODEL --text FILE --output DIR`: from an ordinary model to a fused checkpoint, in one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import Format, Method, read, read_share
from fxfusion.cli.plan import asked_for, choose_plan, plan_work, show_windows
from fxfusion.cli.recover import write_refitted
from fxfusion.cli.results_folder import PLAN, contents, digest
from fxfusion.cli.screen import number
from fxfusion.cli.session import Session, Work, command
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fxfusion.analysis.quality import Quality
    from fxfusion.planning.request import Request

_SEQUENCES = 256  # a refit wants some 50,000 tokens
_HELD_OUT = 8  # one batch in so many
_ROUNDS = 12


@command(sequences=_SEQUENCES)
def auto(
    run: Session,
    output: options.Output,
    choice: options.RoadOptions,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    target_depth: options.TargetDepth = None,
    max_members: options.MaxMembers = None,
    format: options.FormatOption = Format.canonical,
) -> dict[str, Any]:
    """A plan, a fused and refitted checkpoint, its loss and its speed: for any model with its attention intact.

    Windows of layers become one: their attention goes first (or side by side, or away), their FFNs become one wide FFN,
    which is refitted in closed form. Without a budget: the least latency within 1% of the perplexity. An eighth of
    the text is held out; the loss that is reported is measured there. MODEL stays as it is.
    """
    arguments = {
        "max_perplexity_increase": read(max_perplexity_increase, read_share, "--max-perplexity-increase"),
        "target_depth": target_depth,
        "max_members": max_members,
        "preset": "automatic",
        "after_refit": True,
        **choice.arguments(),
    }
    asked = asked_for(arguments)
    run.check(PLAN, output=output)
    from fxfusion.cli import inputs

    inputs.check_format(run.model_dir, format, roads=asked.roads)
    if run.dry_run:
        parts = [Work("refit on all text but an eighth"), Work("loss on the eighth, and speed here")]
        return run.plan_dry_run([*plan_work(run, asked, Method.loss.value), *parts], [PLAN, output])
    return _make(run, asked, output, format)


def _make(run: Session, asked: Request, output: Path, format: Format) -> dict[str, Any]:
    """Choose, refit, measure on held-out text, time, write; what `--json` prints."""
    text, held_out = divided(run.batches)
    chosen = choose_plan(run, asked, text)
    result: dict[str, Any] = {**chosen.to_dict(), "text": run.text_facts, "output": None}
    if chosen.plan.changes_nothing:
        show_windows(run, result)
        run.screen.line("no window of layers is within the budget: nothing is written", "bold red")
        return result
    chosen.plan.save(run.folder.file(PLAN), overwrite=run.overwrite)
    cache = run.folder.file(f"refit_{digest([contents(chosen.plan), run.text_facts])}")
    fused = fxfusion.refit(run.model, chosen.plan, text, cache=cache, progress=run.screen.notes.is_terminal)
    with run.screen.busy("measuring on held-out text"):
        quality = _quality(run, fused, held_out)
    result["quality"] = {name: each.to_dict() for name, each in quality.items()}
    with run.screen.busy("timing both models on this machine"):
        result["speed"] = _speed(run, fused, held_out[0])
    write_refitted(run, fused, chosen.plan, output, format, card={"quality": _card(quality)})
    result["output"] = str(output)
    show_windows(run, result)
    _show_speed(run, result["speed"])
    perplexities = [float(each.perplexity) for each in quality.values()]
    run.screen.line(over_budget(asked.budget.max_perplexity_increase, *perplexities) or "", "bold yellow")
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


def _quality(run: Session, fused: PreTrainedModel, held_out: list[Tensor]) -> dict[str, Quality]:
    from fxfusion.analysis.quality import record_logits

    reference = record_logits(run.model, held_out)
    return {
        "intact model": fxfusion.evaluate(run.model, held_out, reference),
        "fused and refitted": fxfusion.evaluate(fused, held_out, reference),
    }


def _speed(run: Session, fused: PreTrainedModel, batch: Tensor) -> dict[str, Any]:
    """Both models in eager mode, interleaved, with the intact model against itself as control."""
    import torch

    from fxfusion.cli import timing
    from fxfusion.cost import interleaved

    found = {}
    for name, tokens in (("a prompt", batch.shape[1]), ("one token", 1)):
        ids = batch[:1, :tokens].to(run.torch_device)
        models = (("intact", run.model), ("fused", fused))
        calls = {label: timing.waited(timing.call_of(model), ids) for label, model in models}
        with torch.no_grad():
            samples = interleaved.sample({**calls, "control": calls["intact"]}, _ROUNDS, run.seed)
        found[name] = {
            "tokens": tokens,
            "milliseconds": {label: interleaved.median(samples[label]) * 1e3 for label in calls},
            "faster": interleaved.ratio(samples["intact"], samples["fused"]).to_dict(),
            "control": interleaved.ratio(samples["intact"], samples["control"]).to_dict(),
        }
    return found


def _show_speed(run: Session, found: dict[str, Any]) -> None:
    from fxfusion.cost.interleaved import Ratio

    rows = [
        (
            f"{name} ({one['tokens']} tokens)" if one["tokens"] > 1 else name,
            *(f"{milliseconds:.2f}" for milliseconds in one["milliseconds"].values()),
            str(Ratio(**one["faster"])),
            str(Ratio(**one["control"])),
        )
        for name, one in found.items()
    ]
    run.screen.line("")
    run.screen.table(("on this machine, eager", "intact [ms]", "fused [ms]", "times faster", "control"), rows)


def _card(quality: dict[str, Quality]) -> dict[str, str]:
    """What the model card says."""
    return {
        f"{measure}, {name}": number(getattr(found, measure).to_dict(), 4)
        for name, found in quality.items()
        for measure in ("perplexity", "kl", "top1")
    }
