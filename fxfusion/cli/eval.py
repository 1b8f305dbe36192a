"""`fxfusion eval MODEL`: what a plan costs in quality, and what it gains in speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import Compiler, check_model, refuse_removed
from fxfusion.cli.results_folder import COMPILED, MODEL, PLAN, QUALITY, contents, digest
from fxfusion.cli.screen import show_evaluation
from fxfusion.cli.session import Session, Work, command
from fxfusion.errors import FxFusionError, OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from fxfusion.plan.fusion_plan import FusionPlan

Baseline = Annotated[
    Path | None, typer.Option(metavar="MODEL", help="What to compare with.", show_default="the model itself, intact")
]
Generate = Annotated[int, typer.Option(min=0, help="Also continue so many prompts greedily, and compare the texts.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of these continuations.")]
Probes = Annotated[int, typer.Option(min=0, help="Also ask so many small questions of each kind (copying, sums, ...).")]
Speed = Annotated[bool, typer.Option("--speed", help="Also time the fused model against the unfused one.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK", help="Also run a task of lm-eval; may be repeated.", show_default=False),
]
TaskFolder = Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.", show_default=False)]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="Examples per task at most.", show_default=False)]

_RECORDED_BYTES = 2**29  # logits of the reference that are kept rather than computed again for each variant
_PROMPT = 32  # tokens
_SPEED_TOKENS = (128, 1)  # per call: reading a prompt, and writing
_ROUNDS = 40

Found = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What to measure beside quality. `generate`: number of prompts, `probes`: of questions of each kind, 0: none."""

    generate: Generate = 0
    new_tokens: NewTokens = 64
    probes: Probes = 0
    speed: Speed = False
    tasks: Tasks = None
    task_folder: TaskFolder = None
    task_limit: TaskLimit = None


@command
def evaluate(
    run: Session,
    parts: Parts,
    plan: options.PlanFile = None,
    baseline: Baseline = None,
    compiler: options.CompilerOption = Compiler.inductor,
) -> dict[str, Any]:
    """Measure what a plan costs: perplexity, KL, agreement, text; each with its 95 % interval and a control.

    The attention that the plan drops is dropped, the model is compiled with the plan's groups, and everything
    is compared with the intact model on the same text. Without --plan MODEL is measured as it is: intact, or fused,
    refitted or recovered; --baseline names the model to compare that with.
    """
    chosen = _read_plan(run, plan)
    if baseline is not None:
        check_model(baseline)
    if parts.probes:
        _ = run.tokenizer  # they are texts: said before the model is loaded
    if parts.speed and not chosen.groups and baseline is None:
        raise OptionError("--speed: there is nothing fused to time; give a --plan with groups, or a --baseline")
    run.check(MODEL, QUALITY, COMPILED, reads=list(filter(None, (plan, baseline))), intact=plan is not None)
    if baseline is not None:
        from fxfusion.cli import inputs

        inputs.causal_config(baseline)  # what cannot be read is said before MODEL is loaded
    if run.dry_run:
        return run.plan_dry_run(_work(chosen, baseline, parts), [QUALITY])
    result = Evaluation(run=run, plan=chosen, compiler=compiler.value, baseline=baseline).measure(parts, plan)
    show_evaluation(result, run.screen)
    run.screen.line(
        f"\nkept in {run.folder.file(QUALITY)}; fxfusion report --results {run.folder.path} shows it", "dim"
    )
    return result


def _read_plan(run: Session, file: Path | None) -> FusionPlan:
    if file is not None:
        plan = fxfusion.FusionPlan.load(file)
        refuse_removed(plan, "eval")
        return plan
    if run.folder.file(PLAN).is_file():
        run.screen.note(f"there is a plan in {run.folder.file(PLAN)}; give it by --plan to measure it")
    return fxfusion.FusionPlan()


def _work(plan: FusionPlan, baseline: Path | None, parts: Parts) -> list[Work]:
    found = [Work("the reference, and itself again as control", 2)]
    found += [Work("the model itself", 1)] if baseline is not None else []
    dropped, groups = len(plan.dropped_attention), len(plan.groups)
    found += [Work(f"without the attention of {dropped} layers", 1)] if dropped else []
    found += [Work(f"compiled with {groups} group{'s' if groups > 1 else ''}", 1)] if groups else []
    found += [Work(f"two continuations of {parts.generate} prompts")] if parts.generate else []
    found += [Work(f"{parts.probes} probes of each kind")] if parts.probes else []
    found += [Work("timing, fused and unfused")] if parts.speed else []
    return found + [Work(f"task {task}") for task in parts.tasks or ()]


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to measure. `plan`: what of the plan is done to it; `make`: gives it, when it is needed."""

    name: str
    plan: FusionPlan
    make: Callable[[], nn.Module]


@dataclass(kw_only=True)
class Evaluation:
    """`plan`: of nothing, where none was given. `baseline`: folder of the model to compare with; None: the intact one.

    Models are made when they are first needed: nothing is compiled for what is kept already.
    """

    run: Session
    plan: FusionPlan
    compiler: str
    baseline: Path | None = None

    @cached_property
    def identity(self) -> Found:
        """What every measurement depends on."""
        from fxfusion.models.fingerprint import facts_of

        run, _ = self.run, self.run.model  # first, since it checks the folder
        return {
            "model": run.facts,
            "reference": None if self.baseline is None else facts_of(self.reference).model_dump(mode="json"),
            "dtype": run.dtype_name,
            "device": run.torch_device.type,
            "text": run.text_facts["digest"],
            "seed": run.seed,
        }

    @cached_property
    def kept(self) -> Found:
        """What was measured, by what it depends on."""
        return dict((self.run.folder.read(QUALITY) or {}).get("kept", {}))

    def measure(self, parts: Parts, plan_file: Path | None) -> Found:
        """All parts that were asked for, kept and as one result."""
        run = self.run
        result: Found = {
            "model": str(run.model_dir),
            "baseline": None if self.baseline is None else str(self.baseline),
            "plan": None if plan_file is None else str(plan_file),
            "plan_contents": None if plan_file is None else contents(self.plan),
            "text": run.text_facts,
            "dtype": run.dtype_name,
            "compiler": self.compiler if self.plan.groups else None,
            "quality": self.quality(),
        }
        if parts.generate:
            result["generation"] = self.generation(parts.generate, parts.new_tokens)
        if parts.probes:
            result["probes"] = self.probes(parts.probes)
        if parts.speed:
            result["speed"] = self.speed()
        if parts.tasks:
            result["tasks"] = self.tasks(parts.tasks, parts.task_folder, parts.task_limit)
        run.folder.write(QUALITY, {"latest": result, "kept": self.kept})
        return result

    # --- variants -------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> PreTrainedModel:
        """What the others are compared with."""
        if self.baseline is None:
            return self.run.model
        from fxfusion.cli import inputs

        with self.run.screen.busy("loading the baseline"):
            model = inputs.load_model(self.baseline, self.run.torch_device, self.run.dtype_name)
        self.run.tell_read(self.baseline, model.dtype)
        return model

    @cached_property
    def logits(self) -> list[Tensor] | nn.Module:
        """The reference's logits where they are small enough to keep, else the reference itself."""
        from fxfusion.analysis.quality import record_logits
        from fxfusion.cli.inputs import vocabulary

        with self.run.screen.busy("running the reference"):
            per_token = vocabulary(self.reference.config) * next(self.reference.parameters()).element_size()
            tokens = sum(batch.numel() for batch in self.run.batches)
            fits = per_token * tokens <= _RECORDED_BYTES
            return record_logits(self.reference, self.run.batches) if fits else self.reference

    @cached_property
    def dropped(self) -> PreTrainedModel:
        """The model without the attention that the plan drops."""
        from fxfusion.cli.timing import without_attention

        with self.run.screen.busy("dropping attention"):
            return without_attention(self.run.model, self.plan)

    @cached_property
    def fused(self) -> nn.Module:
        """The model under the plan, compiled at its first call."""
        from fxfusion.cli.timing import compiled

        return compiled(self.dropped, self.plan, self.compiler) if self.plan.groups else self.dropped

    def variants(self) -> list[Variant]:
        """What to measure: the reference, which is its own control, and what the plan makes of the model."""
        reference, own = self._names()
        found = [Variant(reference, fxfusion.FusionPlan(), lambda: self.reference)]
        if self.baseline is not None:
            found.append(Variant(own, fxfusion.FusionPlan(), lambda: self.run.model))
        count, groups = len(self.plan.dropped_attention), self.plan.groups
        if count:
            dropped = fxfusion.FusionPlan(dropped_attention=self.plan.dropped_attention)
            found.append(Variant(f"without {count} attention{'s' if count > 1 else ''}", dropped, lambda: self.dropped))
        if groups:
            fused = sum(map(len, groups))
            found.append(Variant(f"fused: {fused} FFNs in {len(groups)}", self.plan, lambda: self.fused))
        return found

    def _names(self) -> tuple[str, str]:
        """What the reference and the model are called, each by one name only."""
        from fxfusion.cli.inputs import is_changed

        own = self.run.model_dir.resolve()
        if self.baseline is None:
            return (own.name if is_changed(own) else "intact model"), own.name
        other = self.baseline.resolve()
        if other.name != own.name:
            return other.name, own.name
        return ("the baseline", own.name) if other == own else (str(other), str(own))

    # --- parts ----------------------------------------------------------------------------------------

    def quality(self) -> dict[str, Found]:
        """Quality of each variant against the reference, the reference itself included: the control."""
        return {
            each.name: self._keep(f"quality {each.name}", each.plan, partial(self._quality, each))
            for each in self.variants()
        }

    def _quality(self, variant: Variant) -> Found:
        from fxfusion.backend import forget_reports

        run, name, model = self.run, variant.name, variant.make()
        logits = self.logits
        forget_reports()
        with run.screen.busy(f"measuring: {name}"):
            found = fxfusion.evaluate(model, run.batches, logits, seed=run.seed)
        wrong = next((what for what in ("loss", "kl") if not math.isfinite(float(getattr(found, what)))), None)
        if wrong is not None:
            advice = " (try --dtype float32)" if run.dtype_name == "float16" else ""
            raise FxFusionError(f"the {wrong} of {name!r} is not finite: its logits hold NaN or infinities{advice}")
        reports = fxfusion.last_reports()
        if variant.plan.groups and reports:  # what the compiler found and refused, for the page of results
            run.folder.write(COMPILED, reports[-1].to_dict())
        return found.to_dict()

    def generation(self, prompts: int, new_tokens: int) -> Found:
        """Greedy continuations of the first tokens of some sequences: how long they are the reference's."""
        what = f"generation {prompts} {new_tokens}"
        return self._keep(what, self.plan, partial(self._generation, prompts, new_tokens))

    def _generation(self, prompts: int, new_tokens: int) -> Found:
        import torch

        run = self.run
        starts = torch.cat(run.batches)[:prompts, : min(_PROMPT, run.length // 2)]
        model = self.fused if self.plan.groups or self.plan.dropped_attention else run.model
        with run.screen.busy(f"writing {new_tokens} tokens after each of {len(starts)} prompts"):
            found = fxfusion.greedy_agreement(
                model,
                self.reference,
                [starts],
                new_tokens,
                batch=run.batch,
                tokenizer=run.tokenizer_if_any,
                seed=run.seed,
            )
        return found.to_dict()

    def probes(self, per_kind: int) -> dict[str, Found]:
        """For each variant the part of the probes that it solves, and of those that the reference solves; by kind."""
        from fxfusion.analysis.probes import ProbeScores, probe

        def asked(variant: Variant) -> Found:
            with self.run.screen.busy(f"probes: {variant.name}"):
                return probe(variant.make(), self.run.tokenizer, per_kind=per_kind, seed=self.run.seed).to_dict()

        variants = self.variants()
        scores = {
            each.name: ProbeScores.from_dict(
                self._keep(f"probes {per_kind} {each.name}", each.plan, partial(asked, each))
            )
            for each in variants
        }
        reference = scores[variants[0].name]
        return {name: {**own.to_dict(), "kept": own.kept(reference)} for name, own in scores.items()}

    def speed(self) -> dict[str, Found]:
        """How many times faster the fused model is than without fusing, and than the intact one, all compiled alike;
        without a plan, how many times faster the model is than the baseline."""
        sizes = [min(tokens, self.run.length) for tokens in _SPEED_TOKENS]
        names = {tokens: f"{tokens} token{'s' if tokens > 1 else ''} a call" for tokens in sizes}
        return {
            name: self._keep(f"speed {tokens}", self.plan, partial(self._speed, tokens))
            for tokens, name in names.items()
        }

    def _speed(self, tokens: int) -> Found:
        import torch

        from fxfusion.cli import timing

        run, ids = self.run, self.run.batches[0][:1, :tokens].to(self.run.torch_device)

        def compiled(model: nn.Module) -> Callable[[], None]:
            call = torch.compile(timing.call_of(model), backend=self.compiler, dynamic=False)
            return timing.waited(call, ids)

        if self.plan.groups:
            fused = timing.waited(timing.compiled(timing.call_of(self.dropped), self.plan, self.compiler), ids)
            others = {"unfused": compiled(self.dropped)}
            others |= {"intact": compiled(run.model)} if self.plan.dropped_attention else {}
        else:
            fused, others = compiled(run.model), {"baseline": compiled(self.reference)}
        with run.screen.busy(f"compiling and timing calls with {tokens} tokens"):
            return {"tokens": tokens, **timing.compared(fused, others, _ROUNDS, run.seed)}

    def tasks(self, names: Sequence[str], folder: Path | None, limit: int | None) -> dict[str, Found]:
        """Scores on tasks of lm-eval, of the reference and of what the plan makes."""
        what = f"tasks {list(names)} {limit}"
        models = [self.variants()[0], *self.variants()[1:][-1:]]
        return {
            each.name: self._keep(f"{what} {each.name}", each.plan, partial(self._tasks, each, names, folder, limit))
            for each in models
        }

    def _tasks(self, variant: Variant, tasks: Sequence[str], folder: Path | None, limit: int | None) -> Found:
        from fxfusion.analysis.lm_eval import lm_eval_results

        run = self.run
        with run.screen.busy(f"tasks: {variant.name}"):
            found = lm_eval_results(
                variant.make(),
                run.tokenizer,
                tasks,
                batch_size=run.batch,
                limit=limit,
                include_path=folder,
                seed=run.seed,
            )
        return {task: score.to_dict() for task, score in found.items()}

    # --- what is kept ---------------------------------------------------------------------------------

    def _keep(self, what: str, plan: FusionPlan, make: Callable[[], Found]) -> Found:
        """What was measured before in just this way, or what `make` measures now. `plan`: what it depends on."""
        key = digest([self.identity, contents(plan), self.compiler if plan.groups else None, what])
        if key not in self.kept:
            self.kept[key] = make()
            latest = (self.run.folder.read(QUALITY) or {}).get("latest")
            self.run.folder.write(QUALITY, {"latest": latest, "kept": self.kept})
        found: Found = self.kept[key]
        return found
