"""What each attention is worth: how much the model changes when one of them is left out.

| method | score of a layer, mean over tokens | cost |
|---|---|---|
| cosine | 1 - cos(x, x + attention(x)): how far the attention turns the stream | one run |
| loss | increase of the next-token loss, in nats, when the attention is left out | one run per layer |
| kl | KL(intact || without the attention) of the next token, in nats | one run per layer |

With `unit="ffn"` or `"block"` the same is asked of FFNs, or of whole decoder layers: the cosine of those is the block
influence of ShortGPT, greedy dropping by the loss is SLEB. A low score is cheap to drop. A run without one attention
starts at that attention: what comes before is reused.

Source: S. He et al., "What Matters in Transformers? Not All Attention is Needed", arXiv 2406.15786 (cosine); of blocks:
X. Men et al., "ShortGPT", arXiv 2403.03853 (cosine), J. Song et al., "SLEB", arXiv 2402.09025 (loss, greedy).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import Batch, read_batches
from fxfusion.analysis.intervals import POSITIVE, UNBOUNDED, Bounds, Estimate, ratio_estimates
from fxfusion.analysis.score_runs import UNITS, ScoreRuns, Unit
from fxfusion.errors import OptionError
from fxfusion.models.traced import TracedModel
from fxfusion.report.plain import table

Method = Literal["cosine", "loss", "kl"]

_BOUNDS: dict[str, Bounds] = {"cosine": (0.0, 2.0), "loss": UNBOUNDED, "kl": POSITIVE}


@dataclass(frozen=True, slots=True)
class LayerScore:
    """Score of one layer's attention. `error`: standard error over sequences, None for a single one."""

    layer: int
    name: str
    value: Estimate
    error: float | None

    def __float__(self) -> float:
        return self.value.value

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.value}"

    def to_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "name": self.name, **self.value.to_dict(), "error": self.error}


@dataclass(frozen=True, slots=True)
class GreedyStep:
    """One step of greedy dropping. `score`: that of the layer dropped, given what was dropped before.

    `cost`: what all drops so far cost together, against the intact model: the loss increase in nats per
    token, or with method "kl" the KL divergence.
    """

    layer: int
    score: LayerScore
    cost: Estimate
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "score": self.score.to_dict(), "cost": self.cost.to_dict(), "error": self.error}

    def __str__(self) -> str:
        return f"layer {self.layer} dropped: {self.cost} in all"


@dataclass(frozen=True, slots=True)
class AttentionScores:
    """`scores`: by layer, each with all other attention in place. `steps`: greedy dropping, if asked for."""

    method: Method
    scores: tuple[LayerScore, ...]
    tokens: int
    sequences: int
    steps: tuple[GreedyStep, ...] = ()

    def __getitem__(self, layer: int) -> LayerScore:
        """The score of a decoder layer, by its number. Raises KeyError."""
        for score in self.scores:
            if score.layer == layer:
                return score
        raise KeyError(f"layer {layer} was not scored; {[score.layer for score in self.scores]} were")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(score.layer for score in self.scores)

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers, the cheapest to drop first."""
        return tuple(score.layer for score in sorted(self.scores, key=float))

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order in which greedy dropping took them."""
        return tuple(step.layer for step in self.steps)

    @property
    def curve(self) -> tuple[Estimate, ...]:
        """What the drops cost together, after each step."""
        return tuple(step.cost for step in self.steps)

    def __str__(self) -> str:
        turns = {layer: number for number, layer in enumerate(self.order, 1)}
        places = {layer: number for number, layer in enumerate(self.ranking, 1)}
        more = ["greedy turn"] if self.steps else []
        rows = [
            (one.layer, one.value, places[one.layer], *([turns.get(one.layer, "")] if self.steps else []))
            for one in self.scores
        ]
        return table(
            ["layer", self.method, "rank", *more], rows, f"on {self.tokens:,} tokens; rank 1: cheapest to drop"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "method": self.method,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "scores": [score.to_dict() for score in self.scores],
            "ranking": list(self.ranking),
            "steps": [step.to_dict() for step in self.steps],
        }


def attention_scores(
    model: nn.Module | TracedModel,
    batches: Iterable[Batch],
    method: Method = "loss",
    *,
    greedy: bool = False,
    layers: Iterable[int] | None = None,
    drop: int | None = None,
    unit: Unit = "attention",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> AttentionScores:
    """Score the attention (or whatever else mixes tokens) of each decoder layer. The model is not changed.

    Args:
        model: a causal language model that `torch.compile` captures as one graph; it runs in eval mode. A
            `TracedModel` saves capturing it again.
        batches: `input_ids` tensors `[batch, seq]`, or dicts of model inputs. Tokens that are padding in
            `attention_mask` or -100 in `labels` do not count.
        method: see the table above.
        greedy: also drop one attention after the other: the cheapest, given what is dropped already, until
            `drop` are gone (default: all). Scores every layer that is left anew at each step.
        unit: "attention", "ffn" or "block" (all of a layer): what is scored, and left out.
        layers: score (and drop) only these; default: all that have a mixer.
        cache: a JSON file that keeps every number as it is measured; a later call with the same model and
            text goes on from there, other methods and layers included.
        progress: say how far it is, on the error stream.
        resamples, seed: of the bootstrap over sequences behind the 95 % intervals.

    Returns:
        Scores in layer order. Losses are paired with the intact model's on the same tokens. Sums are in
        float32 or wider, whatever the precision of the model.

    Raises:
        OptionError: an unknown method or unit, a layer without attention, a cache of another model or text.
        CaptureError: a model that is not one graph, or has no attention left.
        ValueError: no batches, nothing in them that counts, a value that is not finite, a model on `meta`.
    """
    if method not in get_args(Method):
        raise OptionError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if unit not in UNITS:
        raise OptionError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    runs = ScoreRuns(model, read_batches(batches), method, cache, layers, unit)
    number = _number_to_drop(drop, greedy, runs.layers)
    statistics = _Statistics(resamples, seed)
    with runs.measuring(number, progress):
        first = runs.scores((), runs.layers, with_loss=number > 0)
        steps = _drop_greedily(runs, first, number, statistics)
    counts = runs.counts(method)
    scores = tuple(_layer_score(layer, first[layer], runs, statistics) for layer in runs.layers)
    return AttentionScores(method, scores, int(counts.sum()), int((counts > 0).sum()), steps)


def _number_to_drop(drop: int | None, greedy: bool, layers: Sequence[int]) -> int:
    if not greedy:
        if drop is not None:
            raise OptionError("drop says how many layers greedy dropping takes: it needs greedy=True")
        return 0
    if drop is None:
        return len(layers)
    if not 1 <= drop <= len(layers):
        raise OptionError(f"drop must lie between 1 and {len(layers)}, the number of layers scored; got {drop}")
    return drop


def _drop_greedily(
    runs: ScoreRuns, sums: Mapping[int, Tensor], number: int, statistics: _Statistics
) -> tuple[GreedyStep, ...]:
    """Drop the cheapest layer, score the others anew, and so on. `sums`: the scores before any drop."""
    steps: list[GreedyStep] = []
    dropped: tuple[int, ...] = ()
    cost = torch.zeros(1, dtype=torch.float64)
    while len(dropped) < number:
        layer = min(sums, key=lambda layer: float(sums[layer].sum()))  # equal token counts: sums rank like means
        # Losses are against the intact model; what this layer adds to them is its score.
        score = sums[layer] - cost if runs.method == "loss" else sums[layer]
        dropped = (*dropped, layer)
        left = [other for other in sums if other != layer] if len(dropped) < number else []
        sums = runs.scores(dropped, left, with_loss=True)
        cost = runs.cost(dropped)
        total = statistics.of(cost, runs.counts("loss"), _BOUNDS["kl" if runs.method == "kl" else "loss"])
        steps.append(GreedyStep(layer, _layer_score(layer, score, runs, statistics), *total))
    return tuple(steps)


def _layer_score(layer: int, sums: Tensor, runs: ScoreRuns, statistics: _Statistics) -> LayerScore:
    value, error = statistics.of(sums, runs.counts(runs.method), _BOUNDS[runs.method])
    return LayerScore(layer, runs.names[layer], value, error)


@dataclass(frozen=True, slots=True)
class _Statistics:
    resamples: int
    seed: int

    def of(self, sums: Tensor, counts: Tensor, bounds: Bounds) -> tuple[Estimate, float | None]:
        """Mean per token with its interval, and its standard error, from sums over sequences."""
        used = counts > 0
        sums, counts = sums[used], counts[used].double()
        (value,) = ratio_estimates(sums[:, None], counts, [bounds], resamples=self.resamples, seed=self.seed)
        units = len(sums)
        if units < 2:
            return value, None
        # Linearised: a long sequence moves the ratio by more than a short one.
        residuals = sums - value.value * counts
        return value, float((residuals.square().sum() * units / (units - 1)).sqrt() / counts.sum())
