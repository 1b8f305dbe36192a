"""`fxfusion auto MODEL --text FILE --output DIR`: from an ordinary model to a fused checkpoint, in one command."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.fuse import say_how_to_run
from fxfusion.cli.options import Format, GgufType, Method, read, read_share
from fxfusion.cli.plan import Chosen, asked_for, chosen_of, new_search, plan_work, show_windows
from fxfusion.cli.profiles import PROFILES, Profile, Settings
from fxfusion.cli.recover import write_refitted
from fxfusion.cli.results_folder import AUTO, PLAN, QUALITY, contents, digest
from fxfusion.cli.screen import number, show_speed
from fxfusion.cli.session import Session, Work, command
from fxfusion.errors import OptionError, PlanError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fxfusion.analysis.quality import Quality
    from fxfusion.planning.budget import Budget, Measured
    from fxfusion.planning.choice import Search
    from fxfusion.planning.request import Request

_HELD_OUT = 8  # one batch in so many
_RECORDED_BYTES = 2**29  # logits of the intact model that are kept rather than computed again


@command(sequences=None, batch=None)
def auto(
    run: Session,
    output: options.Output,
    choice: options.RoadOptions,
    profile: options.ProfileOption = Profile.balanced,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    target_depth: options.TargetDepth = None,
    max_members: options.MaxMembers = None,
    nearest: options.Nearest = False,
    format: options.FormatOption = Format.canonical,
    gguf_type: options.GgufTypeOption = GgufType.auto,
) -> dict[str, Any]:
    """A plan, a fused and refitted checkpoint, its loss and its speed: for any model with its attention intact.

    Windows of layers become one: their attention goes first (or side by side, or away), their FFNs become one wide FFN,
    which is refitted in closed form. --profile says how much text and how many candidates (--sequences, --batch,
    --roads, --max-window win over it), and the budget where none is given. An eighth of the text is held out; the loss
    that is reported is measured there. MODEL stays as it is; a run that was stopped goes on from --results.
    """
    settings = PROFILES[profile]
    for name in ("sequences", "batch"):
        if getattr(run, name) is None:
            setattr(run, name, getattr(settings, name))
    limits = {"max_perplexity_increase": max_perplexity_increase, "target_depth": target_depth}
    arguments = _arguments(settings, {**choice.arguments(), **limits, "max_members": max_members})
    roads = asked_for(arguments).roads  # what contradicts itself is refused before anything is read

    def layout() -> None:
        from fxfusion.cli import inputs

        inputs.check_format(run.model_dir, format, roads=roads, output=output, gguf_type=gguf_type)

    run.check(PLAN, QUALITY, AUTO, output=output, intact=True, layout=layout)
    divided(run.batches)
    if settings.remaining is not None and _has_no_budget(arguments):
        arguments["target_depth"] = max(1, math.floor(settings.remaining * run.layers))
    asked = asked_for(arguments)
    run.folder.check_same(AUTO, {"profile": profile.value, "text": run.text_facts})
    sizes = _rehearsed(run, asked, format)
    if run.dry_run:
        parts = [Work("refit on all text but an eighth"), Work("loss on the eighth, and speed here")]
        return run.plan_dry_run([*plan_work(run, asked, Method.loss.value), *parts], [PLAN, output])
    form: dict[str, Any] = {"format": format, "gguf_type": gguf_type}
    job = _Job(run=run, asked=asked, settings=settings, output=output, nearest=nearest, **form)
    return job.make(profile, max(sizes.values(), default=0))


def _arguments(settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """As `make_plan` takes them: what was given, and where nothing was, what the profile says."""
    return {
        **given,
        "max_perplexity_increase": read(given["max_perplexity_increase"], read_share, "--max-perplexity-increase"),
        "preset": "automatic",
        "after_refit": settings.after_refit,
        "roads": given["roads"] or settings.roads,
        "max_window": given["max_window"] or settings.max_window,
    }


def _has_no_budget(arguments: dict[str, Any]) -> bool:
    return all(arguments[name] is None for name in ("max_perplexity_increase", "target_depth", "max_latency"))


def _rehearsed(run: Session, asked: Request, format: Format) -> dict[str, int]:
    """By road, the bytes of the folder. Raises where it could not be written, or not be read again."""
    from fxfusion.cli.rehearsal import rehearse

    with run.screen.busy("trying on the meta device what would be written"):
        return rehearse(run.model_dir, format, asked.roads or (), run.mixers, run.layers)


def divided(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Text to choose and refit with, and text that neither sees. Raises `OptionError` where there is too little."""
    if len(batches) < 3:
        raise OptionError(
            f"--text: {len(batches)} batches of text are too few to choose by, to refit to, and to measure on; give "
            "more text, or smaller batches (--batch)"
        )
    held_out = list(batches[::_HELD_OUT])
    return [batch for number, batch in enumerate(batches) if number % _HELD_OUT], held_out


@dataclass(kw_only=True)
class _Job:
    """One run: choose, refit, measure on held-out text, time, write."""

    run: Session
    asked: Request
    settings: Settings
    output: Path
    format: Format
    gguf_type: GgufType
    nearest: bool
    begin: Callable[[str], None] = field(init=False)
    text: list[Tensor] = field(init=False)
    held_out: list[Tensor] = field(init=False)

    def make(self, profile: Profile, written: int) -> dict[str, Any]:
        """What `--json` prints. `written`: bytes of the folder."""
        from fxfusion.report.progress import whole

        self.text, self.held_out = divided(self.run.batches)
        parts = self._told(written)
        self.run.folder.write(AUTO, {"profile": profile.value, "text": self.run.text_facts, **self.settings.to_dict()})
        with whole(parts) as begin:
            names = list(parts)
            self.begin = lambda name: begin(names[_PARTS.index(name)])
            return self._make()

    def _told(self, written: int) -> dict[str, float]:
        """Say what will be done, how long it takes and what room; the parts with their seconds."""
        from fxfusion.models.traced import TracedModel
        from fxfusion.planning import forecast

        run, model = self.run, self.run.model
        with run.screen.busy("timing one block of the model"):
            each = forecast.seconds_per_token(TracedModel(model), self.text[0].to(run.torch_device))
        counts = (sum(batch.numel() for batch in batches) for batches in (self._choosing(), self.text, self.held_out))
        room = forecast.room_of(model, self.text[0], written)
        room.check(self.output)
        steps = forecast.steps_of(self.asked, *counts, layers=run.layers, mixers=len(run.mixers), each=each)
        for line in forecast.lines_of(steps, room):
            run.screen.note(line)
        return {step.what: step.seconds for step in steps}

    def _choosing(self) -> list[Tensor]:
        """The text that plans are chosen by."""
        from fxfusion.planning.scores import first

        most = self.settings.choosing
        return self.text if most is None else cast("list[Tensor]", first(self.text, most))

    def _make(self) -> dict[str, Any]:
        run = self.run
        self.begin("choose")
        chosen, why_not = self._chosen()
        result: dict[str, Any] = {**chosen.to_dict(), "text": run.text_facts, "output": None, "outside": why_not}
        if why_not is not None:
            run.screen.line(why_not, "bold yellow")
        if chosen.plan.changes_nothing or (why_not is not None and not self.nearest):
            show_windows(run, result)
            run.screen.line("nothing is written", "bold red")
            return result
        chosen.plan.save(run.folder.file(PLAN), overwrite=run.overwrite)
        self.begin("refit")
        sides = self.settings.sides
        cache = run.folder.file(f"refit_{digest([contents(chosen.plan), run.text_facts, sides])}")
        fused = fxfusion.refit(
            run.model, chosen.plan, self.text, reference="intact", sides=sides, cache=cache, progress=True
        )
        self.begin("measure")
        quality = self._quality(fused)
        self.begin("time")
        result |= {"quality": {name: one.to_dict() for name, one in quality.items()}, "speed": self._speed(fused)}
        self.begin("write")
        more: dict[str, Any] = {"card": {"quality": _card(quality)}, "gguf_type": self.gguf_type}
        write_refitted(run, fused, chosen.plan, self.output, self.format, **more)
        result["output"] = str(self.output)
        self._keep(chosen, result)
        self._show(result, quality)
        return result

    def _chosen(self) -> tuple[Chosen, str | None]:
        """The plan, and what to say where it is not within the budget: then it is the one that comes nearest."""
        from fxfusion.planning.make_plan import planned

        run, asked = self.run, self.asked
        search = new_search(run, asked, self._choosing())
        try:
            plan, why = planned(search, asked), ""
        except PlanError as error:
            plan, why = fxfusion.FusionPlan(), str(error)
        if not plan.changes_nothing:
            return chosen_of(run, search, asked, plan), None
        found = nearest_plan(search, asked.budget)
        if found is None:
            if why:
                raise PlanError(why)
            return chosen_of(run, search, asked, plan), "no window of layers is within the budget, and none can be had"
        words = f"{why or 'no window of layers is within the budget'}; {_told_nearest(search, found)}"
        advice = "it is taken (--nearest)" if self.nearest else "--nearest writes it"
        return chosen_of(run, search, asked, found.plan), f"{words}; {advice}"

    def _quality(self, fused: PreTrainedModel) -> dict[str, Quality]:
        from fxfusion.analysis.quality import record_logits
        from fxfusion.cli.inputs import vocabulary

        model, held_out = self.run.model, self.held_out
        kept = sum(batch.numel() for batch in held_out) * vocabulary(model.config) * 4 <= _RECORDED_BYTES
        reference: Any = record_logits(model, held_out, progress=True) if kept else model
        return {
            name: fxfusion.evaluate(one, held_out, reference, progress=True)
            for name, one in (("intact model", model), ("fused and refitted", fused))
        }

    def _speed(self, fused: PreTrainedModel) -> dict[str, Any]:
        """Both models in eager mode, interleaved, with the intact model against itself as control."""
        from fxfusion.cli import timing

        run, found = self.run, {}
        for name, tokens in (("a prompt, eager", self.held_out[0].shape[1]), ("one token, eager", 1)):
            ids = self.held_out[0][:1, :tokens].to(run.torch_device)
            intact, own = (timing.waited(timing.call_of(model), ids) for model in (run.model, fused))
            found[name] = {"tokens": tokens, **timing.compared(own, {"intact": intact}, self.settings.rounds, run.seed)}
        return found

    def _keep(self, chosen: Chosen, result: dict[str, Any]) -> None:
        """Quality and speed where `report` looks for them, beside what `eval` measured."""
        run = self.run
        kept = (run.folder.read(QUALITY) or {}).get("kept", {})
        latest = {
            "model": str(run.model_dir),
            "baseline": None,
            "plan": str(run.folder.file(PLAN)),
            "plan_contents": contents(chosen.plan),
            "refitted": True,
            "output": str(self.output),
            "text": run.text_facts,
            "dtype": run.dtype_name,
            "compiler": None,
            "quality": result["quality"],
            "speed": result["speed"],
        }
        run.folder.write(QUALITY, {"latest": latest, "kept": kept})

    def _show(self, result: dict[str, Any], quality: dict[str, Quality]) -> None:
        run = self.run
        show_windows(run, result)
        show_speed(result["speed"], run.screen)
        perplexities = [float(one.perplexity) for one in quality.values()]
        if not self.nearest:
            run.screen.line(over_budget(self.asked.budget.max_perplexity_increase, *perplexities) or "", "bold yellow")
        run.screen.line(f"written: {self.output} ({self.format.value}), plan: {run.folder.file(PLAN)}")
        say_how_to_run(run.screen, self.output, self.format)
        run.screen.line(f"kept in {run.folder.path}; fxfusion report --results {run.folder.path} shows it", "dim")


_PARTS = ("choose", "refit", "measure", "time", "write")  # the steps of `forecast.steps_of`


def nearest_plan(search: Search, budget: Budget) -> Measured | None:
    """Where nothing is within the budget: at a price the plan of least price, else the one of least loss, of those that
    were measured; where none was, the window that costs least alone. None where no window can be had."""
    from fxfusion.planning.roads import plan_of
    from fxfusion.planning.windows import WindowSearch

    known = [one for one in search.found.values() if not one.plan.changes_nothing]
    if not known and isinstance(search, WindowSearch):
        costs = {segment: cost for segment, cost in search.screen.costs.items() if segment.size > 1}
        if costs:
            cheapest = min(costs, key=lambda segment: costs[segment])
            known = [search.measure(plan_of([cheapest], search.screen.mixers, search.screen.norm))]
    if budget.most is not None:
        return min(known, key=search.rank, default=None)
    return min(known, key=lambda one: one.cost, default=None)


def _told_nearest(search: Search, found: Measured) -> str:
    assert found.quality.loss_increase is not None
    share = float(found.quality.loss_increase.exp()) - 1
    return (
        f"the plan that comes nearest (FFN depth {search.judge.ffns} -> {found.depth}) costs {share:+.1%} of the "
        f"perplexity ({found.cost:+.4f} nats per token)"
    )


def over_budget(most: float | None, before: float, after: float) -> str | None:
    """What to say where held-out text does not keep the budget: it was kept on the text that plans are chosen by."""
    if most is None or after <= before * (1 + most):
        return None
    return (
        f"on held-out text perplexity is {after / before - 1:.1%} above the intact model's, more than the {most:.1%} "
        "asked for: choose by more text (--sequences), or ask for less"
    )


def _card(quality: dict[str, Quality]) -> dict[str, str]:
    """What the model card says."""
    return {
        f"{measure}, {name}": number(getattr(found, measure).to_dict(), 4)
        for name, found in quality.items()
        for measure in ("perplexity", "kl", "top1")
    }
