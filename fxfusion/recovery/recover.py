"""`recover`: a fused model learns to predict as the intact one does again (distillation).

Before:  KL(intact || fused) as it is after dropping, fusing and, as a rule, `refit`
After:   smaller on text that decided nothing else; the same modules, names and shapes

`refit` first: it repairs most of the damage in closed form, and training then starts from there. Source:
arXiv 2503.18908, section 4 (knowledge distillation with KL on the logits).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from fxfusion.analysis.batches import Batch, measuring, model_device
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.store import Store, inside, model_key
from fxfusion.errors import OptionError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_record import NAME
from fxfusion.models.fingerprint import facts_of
from fxfusion.models.traced import TracedModel
from fxfusion.recovery.distil import Distillation, Listener, Step
from fxfusion.recovery.student import Precision, Student, Training
from fxfusion.recovery.texts import Texts, check_loss
from fxfusion.report.progress import reporting

RECORD = "recovered"


def recover(
    model: nn.Module,
    batches: Iterable[Batch],
    reference: nn.Module,
    *,
    steps: int = 500,
    validation: Iterable[Batch] | None = None,
    learning_rate: float | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    lora: int | None = None,
    merge: bool = True,
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
    every: int = 25,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_step: Listener | None = None,
) -> Any:
    """Train a model to predict as a reference does, in place: KL(reference || model) on the next token, with AdamW.

    Args:
        model: a causal language model, as a rule fused (and refitted). What `torch.compile` wrapped stays wrapped.
        batches: text to learn from, `input_ids` `[batch, seq]` or dicts of model inputs; one batch a step, all of them
            before any again, in an order that `seed` decides.
        reference: the intact model, on any device. It stays as it is.
        steps: of the optimiser.
        validation: text that decides: the weights that did best on it, measured every `every` steps, are kept, and
            none where nothing was better than the start (with a warning). By default an eighth of `batches`.
        learning_rate: the largest, by default 1e-4, with `lora` 5e-4. It rises in a line over `warmup` (a part of the
            steps), and falls to a tenth along a cosine.
        weight_decay: of matrices. `clip`: norm to which gradients are cut.
        lora: rank of adapters (PEFT) on every linear layer of the decoder, which learn instead of the weights. `merge`:
            add them to the weights at the end; without, a PEFT model with them is returned.
        precision: what products are computed in, "float32", "bfloat16" or "float16"; "auto" is the weights' own. What
            learns is kept in float32 meanwhile.
        gradient_checkpointing: compute activations twice rather than keep them.
        cache: a folder where the run is written down every `every` steps and on Ctrl-C; the same call goes on there.
        progress: say how far it is, and the losses, on the error stream.
        on_step: called with each `Step`.

    Returns:
        `model`, trained; `config.fxfusion["recovered"]` says on how much text, and KL and loss [nats per token] on the
        text for validation before and after. Deterministic on one machine. Without `lora`, memory is about five times
        the weights in float32.

    Raises:
        OptionError: a bad option; text that is too short, or that the reference cannot predict; a cache folder of
            another run, or a broken one.
        SurgeryError: the model has adapters, or weights that cannot be trained.
        FxFusionError: a loss or gradient that is not finite, by step and batch; models of two vocabularies.
        KeyboardInterrupt: after Ctrl-C, at the end of a step. The model is as it was after this and any error.
    """
    training = Training(
        steps=steps,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        lora=lora,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        every=every,
        seed=seed,
    )
    training.check()
    bare, teacher = _models(model, reference)
    texts = Texts.of(batches, validation)
    store = Store(inside(cache, "recover.json"), "stopped training", partial(_facts, bare, teacher, texts, training))
    with measuring(teacher), ExitStack() as always:
        found = _train(Student(bare, training, always), teacher, texts, training, store, merge, progress, on_step)
    return model if found is bare else found


def _models(model: nn.Module, reference: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both, out of what was wrapped around them. Raises as `recover` does, and ValueError for one without weights."""
    bare, teacher = bare_model(model), bare_model(reference)
    if teacher is bare:
        raise OptionError("reference: it is the model itself; give the intact model")
    model_device(bare, "the model")
    model_device(teacher, "the reference")
    return bare, teacher


def _train(
    student: Student,
    teacher: nn.Module,
    texts: Texts,
    training: Training,
    store: Store,
    merge: bool,
    progress: bool,
    on_step: Listener | None,
) -> Any:
    """The trained model; on any error it is what it was."""
    done = False
    try:
        with torch.enable_grad():  # `measuring` turned them off
            run = Distillation(student, teacher, texts, training, store)
            before = run.start()
            _check_text(teacher, before)
            with reporting(progress, "recover", training.steps, done=run.progress.step) as advance:
                run.run(_telling(run, advance, on_step))
        best = run.progress.tensors.get("best")
        if best is None:
            warnings.warn(_why_nothing(run), stacklevel=4)
            return student.model
        found = student.finish(best, merge)
        after = run.measure()
        done = _is_better(after, before)
        if not done:
            warnings.warn("rounded to the weights' own dtype, it is no better than before: not changed", stacklevel=4)
            return student.model
        _note(student.model, texts, run, before, after)
        return found
    finally:
        if not done:
            student.revert()


def _why_nothing(run: Distillation) -> str:
    (_, start), *later = run.progress.validation
    least = min((kl for _, kl in later), default=start)
    rate = run.training.top_rate
    return (
        "nothing was better than the start on the text for validation: not changed "
        f"(KL {start:.4g} at the start, {least:.4g} at best later, with a learning rate of up to {rate:g}; "
        "a refitted model wants a low one, such as a tenth of that)"
    )


def _telling(run: Distillation, advance: Any, on_step: Listener | None) -> Listener:
    def tell(step: Step) -> None:
        last = run.progress.validation[-1][1]
        advance(1, f"KL {step.loss:.4f}, validation {last:.4f}, best {run.best:.4f}")
        if on_step is not None:
            on_step(step)

    return tell


def _facts(model: nn.Module, teacher: nn.Module, texts: Texts, training: Training) -> dict[str, Any]:
    """What tells one run from another."""
    models = {"model": model_key(TracedModel(model)), "reference": model_key(TracedModel(teacher))}
    return {**models, "text": texts.fingerprint, **training.facts()}


def _check_text(teacher: nn.Module, before: Quality) -> None:
    """Raises `OptionError` for text that the reference cannot predict: there is nothing to learn from it."""
    vocabulary = facts_of(teacher, values=False).vocabulary
    assert before.loss_increase is not None
    if vocabulary is not None:
        check_loss(float(before.loss) - float(before.loss_increase), vocabulary)


def _is_better(after: Quality, before: Quality) -> bool:
    assert after.kl is not None and before.kl is not None
    return float(after.kl) < float(before.kl)


def _note(model: Any, texts: Texts, run: Distillation, before: Quality, after: Quality) -> None:
    """What was done, in the config, beside what else is noted there."""
    config = getattr(model, "config", None)
    if config is None:
        return
    entry: dict[str, Any] = {"steps": run.training.steps, "lora": run.training.lora, "tokens": texts.tokens}
    for name, quality in (("before", before), ("after", after)):
        assert quality.kl is not None
        entry |= {f"kl_{name}": float(quality.kl), f"loss_{name}": float(quality.loss)}
    found = getattr(config, NAME, None)
    setattr(config, NAME, {**(found if isinstance(found, dict) else {}), RECORD: entry})
