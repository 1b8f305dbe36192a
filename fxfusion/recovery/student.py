"""A model while it is trained: how (what a caller may choose, checked), which of its tensors learn, in which precision,
and what it was before.

all weights    float32 copies learn, of whatever dtype they are; rounded to it at the end
LoRA           two small matrices beside every linear layer learn (PEFT), added to its weight at the end
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxfusion.errors import OptionError, SurgeryError
from fxfusion.models.adapters.wrappers import find_wrappers

State = dict[str, Tensor]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
_RATE, _LORA_RATE = 1e-4, 5e-4
_LAST = 0.1  # of the largest learning rate, at the last step


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """See `fxfusion.recover`, which has the same names."""

    steps: int
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    lora: int | None = None
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    every: int = 25
    seed: int = 0

    def check(self) -> None:
        """Raises `OptionError` that names the option."""
        for name, least in (("steps", 1), ("every", 1), ("lora", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise OptionError(f"{name}: expected a whole number from {least} on, got {value!r}")
        for name, least, most in (
            ("learning_rate", 0, math.inf),
            ("clip", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                raise OptionError(f"{name}: expected a number from {least} to {most}, got {value!r}")
        if not self.top_rate or not self.clip:
            raise OptionError(f"{'clip' if self.top_rate else 'learning_rate'}: nothing is learned with 0")
        if self.precision not in get_args(Precision):
            raise OptionError(f"precision: expected one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    @property
    def top_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return _RATE if self.lora is None else _LORA_RATE

    def rate(self, step: int) -> float:
        """Of the step with this number, from 0: up in a line, then down a cosine to a tenth."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.top_rate * (step + 1) / rising
        part = (step - rising) / max(1, self.steps - rising)
        return self.top_rate * (_LAST + (1 - _LAST) * (1 + math.cos(math.pi * part)) / 2)

    def autocast(self, weights: torch.dtype) -> torch.dtype | None:
        """What products are computed in, where that is not what the weights are trained in (float32)."""
        name = str(weights).removeprefix("torch.") if self.precision == "auto" else self.precision
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)

    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return asdict(self)


class Student:
    """`module`: what is called; `weights`: what learns, by name, in float32. `revert` makes the model what it was, bit
    for bit; `always` undoes what is of no use after training."""

    def __init__(self, model: Any, training: Training, always: ExitStack) -> None:
        if find_wrappers(model):
            raise SurgeryError("the model has adapters: merge them first (`merge_and_unload`)")
        self.model, self.module, self.lora = model, model, training.lora
        weight = next(value for value in model.parameters() if value.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype
        self._flags = [(value, value.requires_grad) for value in model.parameters()]
        self._before: State = {}
        self._merged: list[tuple[nn.Parameter, Tensor]] = []
        if training.gradient_checkpointing:
            self._checkpoint_gradients(always)
        for part in model.modules():
            always.callback(setattr, part, "training", part.training)
        self.weights = self._all_weights() if self.lora is None else self._adapters(self.lora, training.seed)

    def _all_weights(self) -> dict[str, nn.Parameter]:
        found = {name: value for name, value in self.model.named_parameters() if value.is_floating_point()}
        for name, value in found.items():
            if type(value.detach()) is not Tensor:
                raise SurgeryError(f"{name} is quantised or sharded, and cannot be trained: give lora=8, say")
        self._before = {name: value.detach().clone() for name, value in found.items()}
        for value in found.values():
            value.data = value.data.float()
            value.requires_grad_(True)
        return found

    def _adapters(self, rank: int, seed: int) -> dict[str, nn.Parameter]:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=random_devices(self.device)):
            torch.manual_seed(seed)
            self.module = get_peft_model(self.model, config)
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def _checkpoint_gradients(self, always: ExitStack) -> None:
        if any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules()):
            return
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise OptionError(f"gradient_checkpointing: {type(self.model).__name__} does not support it")
        name = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(self.model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        always.callback(getattr(self.model, f"{name}_checkpointing_disable"))

    def state(self) -> State:
        """A copy of what learns."""
        return {name: value.detach().clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def put(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(state[name])

    def finish(self, state: Mapping[str, Tensor], merge: bool) -> Any:
        """The model with what was learned; without `merge`, adapters stay, in a model of PEFT around it."""
        self.put(state)
        if self.lora is not None and not merge:
            return self.module
        if self.lora is not None:
            self._merged = [(value, value.detach().cpu().clone()) for value, _ in self._flags]
            self.module.merge_and_unload()
        for name, value in self.weights.items() if self.lora is None else ():
            value.data, value.grad = value.data.to(self._before[name].dtype), None
        self._leave()
        return self.model

    def revert(self) -> None:
        if self.module is not self.model:
            self.module.unload()
        for value, before in self._merged:
            value.data.copy_(before)
        for name, value in self.weights.items() if self.lora is None else ():
            value.data, value.grad = self._before[name], None
        self._leave()

    def _leave(self) -> None:
        self.module = self.model
        vars(self.model).pop("peft_config", None)
        for value, flag in self._flags:
            value.requires_grad_(flag)


def random_devices(device: torch.device) -> list[int]:
    """For `torch.random.fork_rng`."""
    return [] if device.type == "cpu" else [device.index or 0]
