"""Everything that the page of results shows, as plain data. Each part may be missing: commands fill in what they made.

Layers are numbered as in the model that was loaded. Losses are in nats per token, agreements are shares from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fxfusion.errors import FxFusionError
from fxfusion.report.model import FusionReport

Mixer = Literal["kept", "moved", "dropped", "none"]
Unit = Literal["block", "ffn"]


def _finite(number: float | None) -> float | None:
    return number if number is None or math.isfinite(number) else None


class _Part:
    """A field that no part knows is an error when read from a file."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Interval(_Part):
    """A measured number with its interval. JSON has no infinity: what is not finite becomes None."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, _finite(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(_Part):
    """The model, before anything was dropped or fused. `hidden`: width of the residual stream."""

    name: str
    architecture: str = ""
    layers: int | None = None
    hidden: int | None = None
    vocabulary: int | None = None
    parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer(_Part):
    """One decoder layer.

    `mixer`: its attention is kept, moved before the FFNs of its group, dropped by the plan, or was never there.
    `width`: intermediate channels of its FFN, 0 without one. `group`: index of the plan's group. `score`: what its
    attention is worth.
    `cosine`: cos(X, f(X)) of the stream before and after the layer; `ratio`: ||h|| / ||X|| with h = f(X) - X.
    """

    number: int
    mixer: Mixer = "kept"
    width: int = 0
    group: int | None = None
    score: Interval | None = None
    cosine: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix(_Part):
    """`values[i][j]`: how far the contribution of layer `layers[j]` turns when that of `layers[i]` is removed.

    Cosine distances; None: not measured. What stands on and below the diagonal may be 0 or None: nothing depends on
    what comes after it. `unit`: whole blocks or FFNs. `dropped`: layers without attention when it was measured.
    """

    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: Unit = "block"
    dropped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.layers)
        if len(self.values) != count or any(len(row) != count for row in self.values):
            shapes = sorted({len(row) for row in self.values})
            raise FxFusionError(f"matrix: {count} layers need {count} x {count} values, got rows of {shapes}")
        values = tuple(tuple(map(_finite, row)) for row in self.values)
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts(_Part):
    """The plan. `mixers`: of each group, what becomes of the attention between its FFNs: none, hoist or wide.

    `made_by`: command, date and versions in one line; `yaml`: the plan file's text.
    """

    dropped_attention: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    groups: tuple[tuple[int | str, ...], ...] = ()
    mixers: tuple[str, ...] = ()
    norm: str = "fold"
    made_by: str = ""
    yaml: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow(_Part):
    """How well one variant predicts text. `loss_increase` and `kl` (nats per token), `top1` and `top5` are against the
    reference, token by token."""

    name: str
    loss: Interval | None = None
    perplexity: Interval | None = None
    loss_increase: Interval | None = None
    kl: Interval | None = None
    top1: Interval | None = None
    top5: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow(_Part):
    """For each kind of generative probe, and for "all", the part that one variant solves of what the first row solves;
    None where that solves none."""

    name: str
    solved: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(_Part):
    """One method of a comparison, brought to an FFN depth. `latency_ms`: predicted; `agreement`: the part of greedily
    written tokens before the first that differs; `probes`: the part solved of what the intact model solves; `best`:
    least KL of those at the depth; `problem`: why there is no such model."""

    method: str
    depth: int
    refitted: bool = False
    ffns: int | None = None
    latency_ms: float | None = None
    perplexity: Interval | None = None
    loss_increase: Interval | None = None
    kl: Interval | None = None
    top1: Interval | None = None
    agreement: float | None = None
    probes: float | None = None
    best: bool = False
    what: str = ""
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.method}{' + refit' if self.refitted else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest(_Part):
    """A comparison of methods. `predicted_for`: device and parallelism of the latencies; `ffns`, `latency_ms`: of the
    intact model; `tokens`: chosen and fitted on, and judged by."""

    entries: tuple[Entry, ...]
    predicted_for: str
    ffns: int
    latency_ms: float
    tokens: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow(_Part):
    """`ratio`: how many times faster; `control`: the same measure of two identical models, which should be 1."""

    name: str
    ratio: Interval
    control: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint(_Part):
    """One plan of a sweep. `depth`: the FFN depth; `front`: no other plan is both shallower and better."""

    label: str
    depth: int
    dropped: int = 0
    fused_bytes: int | None = None
    loss: Interval | None = None
    perplexity: Interval | None = None
    front: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(_Part):
    """Greedy continuations of one prompt. `agreeing`: tokens until the two texts part."""

    prompt: str
    reference: str
    text: str
    agreeing: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Results(_Part):
    """All that is known of one model and its plan.

    `score_method` names how `Layer.score` was measured. The first row of `quality` is what the others are compared
    with, the last one is the plan. `report`: what the compiler found. `notes`: warnings to show on top.
    """

    model: Model | None = None
    layers: tuple[Layer, ...] = ()
    score_method: str = ""
    matrix: Matrix | None = None
    plan: PlanFacts | None = None
    report: FusionReport | None = None
    quality: tuple[QualityRow, ...] = ()
    probes: tuple[ProbeRow, ...] = ()
    speed: tuple[SpeedRow, ...] = ()
    sweep: tuple[SweepPoint, ...] = ()
    comparison: Contest | None = None
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; parts that are missing are left out."""
        found: dict[str, Any] = _adapter().dump_python(self, mode="json", exclude_defaults=True)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """The results of `to_dict`'s data. Raises `FxFusionError` that names each wrong field."""
        try:
            return _adapter().validate_python(data)
        except ValidationError as error:
            problems = "; ".join(_problem(item) for item in error.errors(include_url=False))
            raise FxFusionError(f"these are no results: {problems}") from None


def _problem(item: Mapping[str, Any]) -> str:
    why = "unknown field" if item["type"] == "unexpected_keyword_argument" else item["msg"]
    return f"{'.'.join(map(str, item['loc'])) or 'results'}: {why}"


@cache
def _adapter() -> TypeAdapter[Results]:
    return TypeAdapter(Results)
