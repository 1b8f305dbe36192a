"""What `fxfusion eval` measures, part by part; each part is kept as soon as it is there. Imported when it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxfusion.analysis.generation import greedy_agreement
from fxfusion.analysis.lm_eval import lm_eval_results
from fxfusion.analysis.quality import evaluate, record_logits
from fxfusion.backend import forget_reports, last_reports
from fxfusion.cli import inputs
from fxfusion.cli.planned import call_of, compiled, without_attention
from fxfusion.cli.results_folder import COMPILED, QUALITY, contents, digest
from fxfusion.cli.session import Session
from fxfusion.cost import interleaved
from fxfusion.errors import FxFusionError
from fxfusion.models.fingerprint import facts_of
from fxfusion.plan.fusion_plan import FusionPlan

if TYPE_CHECKING:
    from fxfusion.cli.eval import Parts

_RECORDED_BYTES = 2**29  # logits of the reference that are kept rather than computed again for each variant
_PROMPT = 32  # tokens
_SPEED_TOKENS = (128, 1)  # per call: reading a prompt, and writing
_ROUNDS = 40

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to measure. `plan`: what of the plan is done to it; `make`: gives it, when it is needed."""

    name: str
    plan: FusionPlan
    make: Callable[[], nn.Module]


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """`plan`: of nothing, where none was given. `baseline`: folder of the model to compare with; None: the intact one.

    Models are made when they are first needed: nothing is compiled for what is kept already.
    """

    run: Session
    plan: FusionPlan
    compiler: str
    baseline: Path | None = None
    _reference: nn.Module | None = None
    _logits: list[Tensor] | nn.Module | None = None
    _dropped: Any = None
    _fused: nn.Module | None = None
    _kept: Found = field(default_factory=dict)
    _identity: Found = field(default_factory=dict)

    def __post_init__(self) -> None:
        run = self.run
        _ = run.model  # first, since it checks the folder
        stored = run.folder.read(QUALITY) or {}
        self._kept = dict(stored.get("kept", {}))
        self._identity = {
            "model": run.facts,
            "reference": None if self.baseline is None else facts_of(self.reference).model_dump(mode="json"),
            "dtype": run.dtype,
            "device": run.device.type,
            "text": run.text_facts["digest"],
            "seed": run.common.seed,
        }

    def measure(self, parts: Parts, plan_file: Path | None) -> Found:
        """All parts that were asked for, kept and as one result."""
        run = self.run
        result: Found = {
            "model": str(run.common.model_dir),
            "baseline": None if self.baseline is None else str(self.baseline),
            "plan": None if plan_file is None else str(plan_file),
            "plan_contents": None if plan_file is None else contents(self.plan),
            "text": run.text_facts,
            "dtype": run.dtype,
            "compiler": self.compiler if self.plan.groups else None,
            "quality": self.quality(),
        }
        if parts.generate:
            result["generation"] = self.generation(parts.generate, parts.new_tokens)
        if parts.speed:
            result["speed"] = self.speed()
        if parts.tasks:
            result["tasks"] = self.tasks(parts.tasks, parts.task_folder, parts.task_limit)
        run.folder.write(QUALITY, {"latest": result, "kept": self._kept})
        return result

    # --- variants -------------------------------------------------------------------------------------

    @property
    def reference(self) -> nn.Module:
        """What the others are compared with."""
        if self._reference is None:
            self._reference = self.run.model
            if self.baseline is not None:
                with self.run.screen.busy("loading the baseline"):
                    self._reference = inputs.load_model(self.baseline, self.run.device, self.run.dtype)
        return self._reference

    @property
    def dropped(self) -> Any:
        """The model without the attention that the plan drops."""
        if self._dropped is None:
            with self.run.screen.busy("dropping attention"):
                self._dropped = without_attention(self.run.model, self.plan)
        return self._dropped

    @property
    def fused(self) -> nn.Module:
        """The model under the plan, compiled at its first call."""
        if self._fused is None:
            self._fused = compiled(self.dropped, self.plan, self.compiler) if self.plan.groups else self.dropped
        return self._fused

    def variants(self) -> list[Variant]:
        """What to measure: the reference, which is its own control, and what the plan makes of the model."""
        name = "intact model" if self.baseline is None else self.baseline.resolve().name
        found = [Variant(name, FusionPlan(), lambda: self.reference)]
        if self.baseline is not None:
            found.append(Variant(self.run.name, FusionPlan(), lambda: self.run.model))
        count, groups = len(self.plan.dropped_attention), self.plan.groups
        if count:
            dropped = FusionPlan(dropped_attention=self.plan.dropped_attention)
            found.append(Variant(f"without {count} attention{'s' if count > 1 else ''}", dropped, lambda: self.dropped))
        if groups:
            fused = sum(map(len, groups))
            found.append(Variant(f"fused: {fused} FFNs in {len(groups)}", self.plan, lambda: self.fused))
        return found

    # --- parts ----------------------------------------------------------------------------------------

    def quality(self) -> dict[str, Found]:
        """Quality of each variant against the reference, the reference itself included: the control."""
        return {
            each.name: self._keep(f"quality {each.name}", each.plan, partial(self._quality, each))
            for each in self.variants()
        }

    def _quality(self, variant: Variant) -> Found:
        run, name, model = self.run, variant.name, variant.make()
        if self._logits is None:
            with run.screen.busy("running the reference"):
                self._logits = self._recorded()
        forget_reports()
        with run.screen.busy(f"measuring: {name}"):
            found = evaluate(model, run.batches, self._logits, seed=run.common.seed)
        wrong = next((what for what in ("loss", "kl") if not math.isfinite(float(getattr(found, what)))), None)
        if wrong is not None:
            advice = " (try --dtype float32)" if run.dtype == "float16" else ""
            raise FxFusionError(f"the {wrong} of {name!r} is not finite: its logits hold NaN or infinities{advice}")
        if model is self._fused and last_reports():  # what the compiler found and refused, for the page of results
            run.folder.write(COMPILED, last_reports()[-1].to_dict())
        return found.to_dict()

    def _recorded(self) -> list[Tensor] | nn.Module:
        """The reference's logits where they are small enough to keep, else the reference itself."""
        config: Any = self.reference.config
        per_token = inputs.vocabulary(config) * next(self.reference.parameters()).element_size()
        tokens = sum(batch.numel() for batch in self.run.batches)
        fits = per_token * tokens <= _RECORDED_BYTES
        return record_logits(self.reference, self.run.batches) if fits else self.reference

    def generation(self, prompts: int, new_tokens: int) -> Found:
        """Greedy continuations of the first tokens of some sequences: how long they are the reference's."""
        what = f"generation {prompts} {new_tokens}"
        return self._keep(what, self.plan, partial(self._generation, prompts, new_tokens))

    def _generation(self, prompts: int, new_tokens: int) -> Found:
        run = self.run
        starts = torch.cat(run.batches)[:prompts, : min(_PROMPT, run.common.length // 2)]
        model = self.fused if self.plan.groups or self.plan.dropped_attention else run.model
        with run.screen.busy(f"writing {new_tokens} tokens after each of {len(starts)} prompts"):
            found = greedy_agreement(
                model,
                self.reference,
                [starts],
                new_tokens,
                batch=run.common.batch,
                tokenizer=run.tokenizer_if_any,
                seed=run.common.seed,
            )
        return found.to_dict()

    def speed(self) -> dict[str, Found]:
        """How many times faster the fused model is than without fusing, and than the intact one, all compiled alike."""
        sizes = [min(tokens, self.run.common.length) for tokens in _SPEED_TOKENS]
        names = {tokens: f"{tokens} token{'s' if tokens > 1 else ''} a call" for tokens in sizes}
        return {
            name: self._keep(f"speed {tokens}", self.plan, partial(self._speed, tokens))
            for tokens, name in names.items()
        }

    def _speed(self, tokens: int) -> Found:
        run = self.run
        ids = run.batches[0][:1, :tokens].to(run.device)
        unfused = self._timed(torch.compile(call_of(self.dropped), backend=self.compiler, dynamic=False), ids)
        calls = {
            "fused": self._timed(compiled(call_of(self.dropped), self.plan, self.compiler), ids),
            "unfused": unfused,
            "control": unfused,
        }
        if self.plan.dropped_attention:
            intact = torch.compile(call_of(run.model), backend=self.compiler, dynamic=False)
            calls["intact"] = self._timed(intact, ids)
        with run.screen.busy(f"compiling and timing calls with {tokens} tokens"), torch.no_grad():
            samples = interleaved.sample(calls, _ROUNDS, run.common.seed)
        ratios = {
            name: interleaved.ratio(samples[name], samples["fused"]) for name in calls if name in ("unfused", "intact")
        }
        return {
            "tokens": tokens,
            "seconds": {name: interleaved.median(samples[name]) for name in calls},
            "fused_against": {name: ratio.to_dict() for name, ratio in ratios.items()},
            "control": interleaved.ratio(samples["unfused"], samples["control"]).to_dict(),
        }

    def _timed(self, model: Callable[[Tensor], Any], ids: Tensor) -> Callable[[], None]:
        """One call, until its result is there."""

        def call() -> None:
            model(ids)
            if ids.device.type != "cpu":
                torch.accelerator.synchronize(ids.device)

        return call

    def tasks(self, names: Sequence[str], folder: Path | None, limit: int | None) -> dict[str, Found]:
        """Scores on tasks of lm-eval, of the reference and of what the plan makes."""
        what = f"tasks {list(names)} {limit}"
        models = [self.variants()[0], *self.variants()[1:][-1:]]
        return {
            each.name: self._keep(f"{what} {each.name}", each.plan, partial(self._tasks, each, names, folder, limit))
            for each in models
        }

    def _tasks(self, variant: Variant, tasks: Sequence[str], folder: Path | None, limit: int | None) -> Found:
        run = self.run
        with run.screen.busy(f"tasks: {variant.name}"):
            found = lm_eval_results(
                variant.make(),
                run.tokenizer,
                tasks,
                batch_size=run.common.batch,
                limit=limit,
                include_path=folder,
                seed=run.common.seed,
            )
        return {task: score.to_dict() for task, score in found.items()}

    # --- what is kept ---------------------------------------------------------------------------------

    def _keep(self, what: str, plan: FusionPlan, make: Callable[[], Found]) -> Found:
        """What was measured before in just this way, or what `make` measures now. `plan`: what it depends on."""
        key = digest([self._identity, contents(plan), self.compiler if plan.groups else None, what])
        if key not in self._kept:
            self._kept[key] = make()
            latest = (self.run.folder.read(QUALITY) or {}).get("latest")
            self.run.folder.write(QUALITY, {"latest": latest, "kept": self._kept})
        found: Found = self._kept[key]
        return found
