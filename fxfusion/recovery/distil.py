"""Distillation, step by step: a model learns to predict what another one does.

    loss = sum_v p[v] (log p[v] - log q[v]), mean over the tokens that count        p: reference, q: model; in nats
    AdamW, gradients clipped by their norm, one batch a step in an order that the seed decides

Every so many steps the same is measured on text for validation; the weights that did best there are kept.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import TokenBatch, logits_of
from fxfusion.analysis.quality import Quality, evaluate, record_logits
from fxfusion.analysis.store import Store
from fxfusion.errors import FxFusionError
from fxfusion.models.fingerprint import facts_of
from fxfusion.models.traced import model_inputs
from fxfusion.recovery.student import Student, Training, random_devices
from fxfusion.recovery.texts import Texts

_RECORDED_BYTES = 2**29  # logits of the reference for the text for validation, kept rather than computed each time
_RESAMPLES = 100
_SEEDS = 1_000_003  # more than the steps of a run
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step. `loss`: KL on its batch, before it [nats per token]; `norm`: of the gradient, before it was clipped;
    `validation`: KL on the text for validation after it, where it was measured."""

    step: int
    loss: float
    rate: float
    norm: float
    validation: float | None = None


Listener = Callable[[Step], None]


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run is. `tensors`: by part (weights, best, exp_avg, exp_avg_sq) and name; `best` is missing where nothing
    was better than the start. `taken`: steps of the optimiser; a gradient scaler, whose state is `scale`, leaves some
    out. `validation`: (step, KL) of each measurement."""

    step: int = 0
    taken: int = 0
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    scale: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, store: Store, learning: Mapping[str, Tensor]) -> Progress:
        """What was kept; a beginning where nothing was. Raises `OptionError` where it is broken."""
        found = store.data
        if not found:
            return cls()
        try:
            parts = ("weights", *_MOMENTS, *(["best"] if found["has_best"] else []))
            like = {f"{part}.{name}": value for part in parts for name, value in learning.items()}
            stored = store.tensors(found["kept"], like)
            return cls(
                step=int(found["step"]),
                taken=int(found["taken"]),
                tensors={part: {name: stored[f"{part}.{name}"] for name in learning} for part in parts},
                validation=[(int(at), float(value)) for at, value in found["validation"]],
                scale=dict(found["scale"]),
            )
        except (KeyError, TypeError) as error:
            raise store.broken(repr(error)) from error

    def save(self, store: Store) -> None:
        parts = self.tensors.items()
        kept = store.keep({f"{part}.{name}": value for part, own in parts for name, value in own.items()})
        now = {name: getattr(self, name) for name in ("step", "taken", "scale", "validation")}
        store.data = {**now, "has_best": "best" in self.tensors, "kept": kept}
        store.save()


class Distillation:
    """One run. `progress`: where it is; `best`: the smallest KL so far, that of the start included."""

    def __init__(self, student: Student, reference: nn.Module, texts: Texts, training: Training, store: Store) -> None:
        self.student, self.reference, self.texts = student, reference, texts
        self.training, self.store = training, store
        self._cast = training.autocast(student.dtype)
        kind = student.device.type
        self._scaler = torch.amp.GradScaler(kind, enabled=self._cast is torch.float16)
        self._optimiser = torch.optim.AdamW(self._groups(), lr=training.top_rate, betas=(0.9, 0.95))
        self._decides: Any = None
        self.progress = Progress()

    def start(self) -> Quality:
        """How good the model is as it came; and back to where a run that was stopped is."""
        found = self.measure()
        self.progress = Progress.load(self.store, self.student.weights)
        self._resume()
        if not self.progress.validation:
            self.progress.validation.append((0, self._kl(found)))
        return found

    def run(self, tell: Listener) -> None:
        """To the last step. Ctrl-C writes down where the run is, and is raised. Raises `FxFusionError` for a loss or
        gradient that is not finite."""
        now, training = self.progress, self.training
        with Interrupts() as interrupts:
            while now.step < training.steps:
                step, is_last = now.step + 1, now.step + 1 == training.steps
                loss, norm = self._step(now.step)
                now.step = step
                found = self._validate() if step % training.every == 0 or is_last else None
                tell(Step(step=step, loss=loss, rate=training.rate(step - 1), norm=norm, validation=found))
                if found is not None or interrupts.asked:
                    self._save()
                if interrupts.asked and not is_last:
                    raise KeyboardInterrupt

    @property
    def best(self) -> float:
        return min(value for _, value in self.progress.validation)

    def measure(self) -> Quality:
        """On the text for validation, against the reference."""
        if self._decides is None:
            self._decides = self._reference_logits()
        with self._autocast():
            return evaluate(self._call, self.texts.decide_given, self._decides, resamples=_RESAMPLES)

    def _call(self, input_ids: Tensor, **inputs: Any) -> Any:
        self.student.module.eval()
        return self.student.module(**model_inputs(self.student.model, {"input_ids": input_ids, **inputs}))

    def _validate(self) -> float:
        found = self._kl(self.measure())
        if found < self.best:
            self.progress.tensors["best"] = self.student.state()
        self.progress.validation.append((self.progress.step, found))
        return found

    def _kl(self, quality: Quality) -> float:
        assert quality.kl is not None
        found = float(quality.kl)
        if not found < float("inf"):
            raise FxFusionError(f"after step {self.progress.step} the KL on the text for validation is {found}")
        return found

    def _step(self, number: int) -> tuple[float, float]:
        batch = self._batch(number)
        for group in self._optimiser.param_groups:
            group["lr"] = self.training.rate(number)
        self.student.module.train()
        with torch.random.fork_rng(devices=random_devices(self.student.device)):
            torch.manual_seed(self.training.seed * _SEEDS + number)  # dropout, the same whenever this step is taken
            loss = self._loss(batch)
            if not bool(loss.isfinite()):
                raise FxFusionError(
                    f"step {number + 1}: the loss on batch {batch.number} is {float(loss)}; a smaller learning rate, "
                    "or another precision, may help"
                )
            self._optimiser.zero_grad(set_to_none=True)
            self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.student.weights.values(), self.training.clip)
        if not self._scaler.is_enabled() and not bool(norm.isfinite()):  # a scaler leaves such a step out
            raise FxFusionError(f"step {number + 1}: the gradient on batch {batch.number} is not finite")
        self._scaler.step(self._optimiser)
        self._scaler.update()
        return float(loss.detach()), float(norm)

    def _loss(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            theirs = self._logits(self.reference, self.reference, batch, "the reference").to(self.student.device)
        with self._autocast():
            ours = self._logits(self.student.module, self.student.model, batch, "the model")
        return divergence(ours[:, :-1], theirs[:, :-1], batch.counted.to(ours.device))

    def _logits(self, module: nn.Module, model: nn.Module, batch: TokenBatch, who: str) -> Tensor:
        return logits_of(module(**model_inputs(model, batch.inputs)), batch.seen.shape, batch.number, who)

    def _batch(self, number: int) -> TokenBatch:
        """Every batch once, in a new order, before any of them again."""
        count = len(self.texts.fit)
        random = torch.Generator().manual_seed(self.training.seed + number // count)
        return self.texts.fit[int(torch.randperm(count, generator=random)[number % count])]

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.student.device.type, dtype=self._cast, enabled=self._cast is not None)

    def _groups(self) -> list[dict[str, Any]]:
        """Norms and biases do not decay."""
        weights = self.student.weights.values()
        decaying = [value for value in weights if value.dim() > 1]
        others = [value for value in weights if value.dim() < 2]
        groups = [{"params": decaying, "weight_decay": self.training.weight_decay}]
        return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])

    def _reference_logits(self) -> Any:
        tokens = sum(batch.seen.numel() for batch in self.texts.decide)
        vocabulary = facts_of(self.reference, values=False).vocabulary
        if vocabulary is None or tokens * vocabulary * self.student.dtype.itemsize > _RECORDED_BYTES:
            return self.reference
        return record_logits(self.reference, self.texts.decide_given)

    def _save(self) -> None:
        now, names = self.progress, self.student.weights
        now.tensors["weights"] = {name: value.detach() for name, value in names.items()}
        kept = self._optimiser.state
        for part in _MOMENTS:
            now.tensors[part] = {name: kept[value].get(part, torch.zeros_like(value)) for name, value in names.items()}
        now.taken = max((int(found["step"]) for found in kept.values() if found), default=0)
        now.scale = self._scaler.state_dict()
        now.save(self.store)

    def _resume(self) -> None:
        now = self.progress
        if not now.step:
            return
        self.student.put(now.tensors["weights"])
        names = {id(value): name for name, value in self.student.weights.items()}
        order = [names[id(value)] for group in self._optimiser.param_groups for value in group["params"]]
        kept = {
            place: {"step": torch.tensor(float(now.taken)), **{part: now.tensors[part][name] for part in _MOMENTS}}
            for place, name in enumerate(order)
        }
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": kept})
        self._scaler.load_state_dict(now.scale)
        if "best" in now.tensors:
            now.tensors["best"] = {name: value.to(self.student.device) for name, value in now.tensors["best"].items()}


def divergence(ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
    """Mean KL(reference || model) in nats over the tokens that count, of logits `[batch, positions, vocabulary]`."""
    if ours.shape[-1] != theirs.shape[-1]:
        raise FxFusionError(f"the reference's vocabulary has {theirs.shape[-1]} entries, the model's {ours.shape[-1]}")
    log_q, log_p = ours[counted].float().log_softmax(-1), theirs[counted].float().log_softmax(-1)
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum() / max(1, log_q.shape[0])


class Interrupts:
    """Inside `with`, the first Ctrl-C only sets `asked`; the second is one as ever."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def __exit__(self, *_: object) -> None:
        self._restore()
