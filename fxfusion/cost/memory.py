"""What one device holds: its share of the weights, of the key-value cache, and room for activations."""

from __future__ import annotations

from dataclasses import dataclass

from fxfusion.cost.kernels import Workload, local_channels
from fxfusion.cost.sublayers import Ffn, Step, Sublayer


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory of one device [byte]."""

    weights: float = 0.0
    cache: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations


def sublayer_bytes(part: Sublayer, hidden: int, work: Workload) -> float:
    """The weights of one sublayer on one device, its norm included."""
    norm = hidden * work.size
    if isinstance(part, Ffn):
        return norm + (3 if part.gated else 2) * hidden * part.width / work.tp * work.weight_size
    channels = sum(sum(local_channels(kind, work.tp)) for kind in part.kinds)
    return norm + 2 * hidden * channels * work.weight_size


def step_bytes(step: Step, work: Workload) -> Bytes:
    """All of one device. The embedding is whole on each; a tied lm head is its share of the same table.

    Activations: the stream, what one sublayer makes of it at its widest, and the logits.
    """
    vocabulary = step.vocabulary or 0
    tables = vocabulary * step.hidden * work.size * (1 if step.tied else 1 + 1 / work.tp)
    weights = sum(sublayer_bytes(part, step.hidden, work) for part in step.sublayers) + step.hidden * work.size
    cache = 0.0
    for kind in (kind for part in step.attentions for kind in part.kinds):
        kept = work.context if kind.window is None else min(kind.window, work.context)
        cache += work.batch * kept * 2 * local_channels(kind, work.tp)[1] * work.kv_size
    widest = max((_inner(part, work) for part in step.sublayers), default=0.0)
    activations = (work.tokens * (2 * step.hidden + widest) + work.batch * vocabulary) * work.size
    return Bytes(weights=weights + tables, cache=cache, activations=activations)


def _inner(part: Sublayer, work: Workload) -> float:
    """Channels of one token inside a sublayer."""
    if isinstance(part, Ffn):
        return (3 if part.gated else 2) * part.width / work.tp
    return 2 * sum(sum(local_channels(kind, work.tp)) for kind in part.kinds)
