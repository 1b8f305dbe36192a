"""How a model is trained: what a caller may choose, checked, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from fxfusion.errors import OptionError

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
