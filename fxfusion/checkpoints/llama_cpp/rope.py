"""The rotary embedding of a model in the words of a GGUF file, and the angles that llama.cpp makes of them.

default     rope.freq_base
linear      rope.scaling.type, .factor
yarn        the same with .original_context_length, .yarn_beta_fast, .yarn_beta_slow
llama3      tensor rope_freqs.weight [head_dim / 2]: what each angle is divided by
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.errors import CheckpointError

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": _LLAMA3,
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
_ALWAYS = ("rope_type", "rope_theta", "partial_rotary_factor")
_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None}
_SAME = 1e-5


@dataclass(frozen=True, slots=True)
class Rope:
    """`size`: of a head; `numbers`: those of `_KEYS` for this kind."""

    kind: str
    theta: float
    size: int
    numbers: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, config: Any, size: int) -> Rope:
        """Raises `CheckpointError` where llama.cpp has no such embedding, or the model computes other angles."""
        given = dict(config.rope_parameters)
        kind = given.get("rope_type", "default")
        if kind not in _KEYS:
            raise CheckpointError(f"GGUF's architecture deci has no rotary embedding of rope_type {kind!r}")
        known = (*_ALWAYS, *_KEYS[kind])
        others = [name for name, value in given.items() if name not in known and value is not None]
        if others:
            raise CheckpointError(
                f"GGUF's architecture deci has no such rotary setting: {others[0]} = {given[others[0]]!r} ({kind})"
            )
        numbers = {name: _OPTIONAL.get(name) if given.get(name) is None else given[name] for name in _KEYS[kind]}
        absent = [name for name, value in numbers.items() if value is None and name not in _OPTIONAL]
        if absent:
            raise CheckpointError(f"config.rope_parameters has no {absent[0]}, which {kind} needs")
        found = cls(kind, float(given["rope_theta"]), size, numbers)
        found._check_attention_factor()
        found._check_angles(model)
        return found

    def settings(self) -> dict[str, Any]:
        """Settings of the file, by their names without the architecture."""
        found: dict[str, Any] = {"rope.freq_base": self.theta, "rope.dimension_count": self.size}
        if self.kind in ("linear", "yarn"):
            found |= {"rope.scaling.type": self.kind, "rope.scaling.factor": float(self.numbers["factor"])}
        if self.kind == "yarn":
            found["rope.scaling.original_context_length"] = int(self.numbers["original_max_position_embeddings"])
            found["rope.scaling.yarn_beta_fast"] = float(self.numbers["beta_fast"])
            found["rope.scaling.yarn_beta_slow"] = float(self.numbers["beta_slow"])
        return found

    def divisors(self) -> Tensor | None:
        """`rope_freqs.weight`, float32 `[size / 2]`; None without one. Source: convert_hf_to_gguf.py of llama.cpp."""
        if self.kind != "llama3":
            return None
        factor, low, high, reach = (float(self.numbers[name]) for name in _LLAMA3)
        found = []
        for speed in self._plain().tolist():
            turns = reach * speed / (2 * math.pi)  # within the context that the model was first trained on
            if turns > high or turns < low:
                found.append(1.0 if turns > high else factor)
            else:
                smooth = (turns - low) / (high - low)
                found.append(1 / ((1 - smooth) / factor + smooth))
        return torch.tensor(found, dtype=torch.float32)

    def speeds(self) -> Tensor:
        """The angle of each pair of channels per token, float64 `[size / 2]`."""
        plain, divisors = self._plain(), self.divisors()
        if divisors is not None:
            return plain / divisors.double()
        if self.kind == "linear":
            return plain / float(self.numbers["factor"])
        return plain if self.kind == "default" else self._yarn(plain)

    @property
    def length(self) -> float:
        """What rotated channels are multiplied by."""
        return 1 + 0.1 * math.log(self.numbers["factor"]) if self.kind == "yarn" else 1.0

    def _plain(self) -> Tensor:
        return self.theta ** -(torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)

    def _yarn(self, plain: Tensor) -> Tensor:
        """Source: ggml_rope_yarn_corr_dims and rope_yarn of ggml."""
        reach = self.numbers["original_max_position_embeddings"]

        def place(turns: float) -> float:
            return self.size * math.log(reach / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first = max(0.0, math.floor(place(self.numbers["beta_fast"])))
        last = min(self.size - 1.0, math.ceil(place(self.numbers["beta_slow"])))
        steps = torch.arange(self.size // 2, dtype=torch.float64)
        kept = 1 - ((steps - first) / max(0.001, last - first)).clamp(0, 1)
        return plain * (kept + (1 - kept) / float(self.numbers["factor"]))

    def _check_attention_factor(self) -> None:
        given = self.numbers.get("attention_factor")
        if given is not None and abs(given - self.length) > _SAME:
            raise CheckpointError(
                f"llama.cpp's yarn multiplies by {self.length:.4g}, and the model by {given} (attention_factor)"
            )

    def _check_angles(self, model: nn.Module) -> None:
        """Seven tokens would not show what the slowest channels do, so these are compared as they are."""
        for name, value in model.named_buffers():
            if name.rpartition(".")[2] != "inv_freq" or value.is_meta:
                continue
            facts, wanted = torch.finfo(value.dtype), self.speeds()  # some models round them with their weights
            own = value.detach().double().cpu()
            rtol, atol = max(1e-4, 2 * facts.eps), facts.smallest_normal * facts.eps
            if own.shape != wanted.shape or not torch.allclose(own, wanted, rtol=rtol, atol=atol):
                raise CheckpointError(f"{name} is not what llama.cpp computes for rope_type {self.kind!r}")
