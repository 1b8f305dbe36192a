"""How well a causal language model predicts text, and how far it is from a reference, each with a 95 % interval.

The loss is the mean negative log-likelihood of the next token, in nats per token, over all tokens that count.
Against a reference (the intact model, say) there are also the KL divergence of the predictions and their agreement:
see `fxfusion.analysis.measures` for the definitions, `fxfusion.analysis.intervals` for the intervals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fxfusion.analysis.batches import (
    IGNORED,
    Batch,
    Model,
    as_inputs,
    logits_of,
    measuring,
    model_device,
    run_model,
    split_targets,
)
from fxfusion.analysis.intervals import FRACTION, POSITIVE, UNBOUNDED, Bounds, Estimate, ratio_estimates
from fxfusion.analysis.measures import LOSS_ONLY, WITH_REFERENCE, token_measures
from fxfusion.report.plain import lines
from fxfusion.report.progress import each

__all__ = ["Batch", "Estimate", "Quality", "evaluate", "record_logits"]

Run = Callable[[dict[str, Any]], Any]  # from model inputs to whatever the model returns

_BOUNDS: dict[str, Bounds] = {
    "loss": POSITIVE,
    "loss_increase": UNBOUNDED,
    "kl": POSITIVE,
    "top1": FRACTION,
    "top5": FRACTION,
}
# The first of these that is not finite is at fault; what follows from it is not reported again.
_FAULTS = {"loss": "the loss", "loss_increase": "the reference's loss", "kl": "the KL divergence from the reference"}


@dataclass(frozen=True)
class Quality:
    """What `evaluate` measured. Means are over all tokens that count; those after `sequences` need a reference.

    `loss` is in nats per token; `perplexity` is `exp(loss)`, its interval `exp` of the loss's.
    `tokens` counts the predicted tokens, `sequences` the rows that hold at least one of them.
    `kl` is KL(reference || model) in nats per token. `top1` is the fraction of tokens where the model's most likely
    token is the reference's, `top5` where the reference's most likely token is among the model's five.
    `loss_increase` is the loss minus the reference's on the same tokens: its interval is far tighter than that of
    either loss, and `loss_increase.exp()` is the ratio of the perplexities.
    """

    loss: Estimate
    perplexity: Estimate
    tokens: int
    sequences: int
    kl: Estimate | None = None
    top1: Estimate | None = None
    top5: Estimate | None = None
    loss_increase: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON. What needs a reference is None without one."""
        return {name: value.to_dict() if isinstance(value, Estimate) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        rows: list[tuple[str, Estimate | None]] = [
            ("loss [nats per token]", self.loss),
            ("perplexity", self.perplexity),
            ("loss increase", self.loss_increase),
            ("KL [nats per token]", self.kl),
            ("top 1 agrees", self.top1),
            ("top 5 agrees", self.top5),
        ]
        return lines(rows, f"on {self.tokens:,} tokens in {self.sequences:,} sequences; in brackets: 95 % intervals")


def evaluate(
    model: Model,
    batches: Iterable[Batch],
    reference: Model | Iterable[Tensor] | None = None,
    *,
    progress: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Quality:
    """Measure the next-token loss of a causal language model, and how its predictions differ from a reference's.

    Args:
        model: a module (compiled or not) or function from `input_ids` to logits `[batch, seq, vocabulary]`:
            bare, first in a tuple, or as `.logits`. It runs in eval mode without gradients; afterwards every
            submodule has its own mode again.
        batches: `input_ids` tensors `[batch, seq]`, or dicts of model inputs. In a dict, a token counts only
            if `attention_mask` `[batch, seq]` is non-zero there and at the token before, and `labels`
            `[batch, seq]` (default: `input_ids`; not passed to the model) is not -100. Labels are aligned
            with the inputs: the shift by one happens here.
        reference: a model like `model`, run beside it batch by batch, or its logits for each batch in order (see
            `record_logits`). The model itself is the control: it must give `kl` 0, `top1` 1, `loss_increase` 0.
        progress: say how far it is, on the error stream.
        resamples: bootstrap resamples of the sequences, at least 100.
        seed: decides the resamples.

    Returns:
        Means over tokens, computed in float32 whatever the model's dtype. The 95 % intervals are from one bootstrap
        over sequences, so that they are paired; from a single sequence an interval is all that the definition
        allows. A measure that is not finite is returned as such, with NaN for its interval and a warning that
        names the first such batch.

    Raises:
        ValueError: no batches, no token that counts, a batch or logits of a wrong shape, a model on `meta`, a
            reference with another vocabulary or another number of batches.
        TypeError: a batch that is neither a tensor nor a dict.
    """
    names = LOSS_ONLY if reference is None else WITH_REFERENCE
    sums = [torch.zeros(0, len(names), dtype=torch.float64)]
    counts = [torch.zeros(0, dtype=torch.int64)]
    broken: dict[str, list[int]] = {}
    number, other = -1, None
    with measuring(model, reference):
        run = partial(run_model, model, device=model_device(model))
        others = None if reference is None else _reference_runs(reference)
        for number, batch in enumerate(each(batches, progress, "evaluate")):
            if others is not None and (other := next(others, None)) is None:
                raise ValueError(f"the reference has logits for {number} batches only: none for batch {number}")
            total, count = _batch_sums(run, other, as_inputs(batch, number), number)
            fault = next((name for name, ok in zip(names, total.isfinite().all(dim=0), strict=True) if not ok), None)
            if fault is not None:
                broken.setdefault(fault, []).append(number)
            sums.append(total)
            counts.append(count)
    if number < 0:
        raise ValueError("batches is empty: nothing to evaluate (a generator can be used up only once)")
    if others is not None and not callable(reference) and next(others, None) is not None:
        raise ValueError(f"the reference has logits for more than these {number + 1} batches: are they its own?")
    for name, where in broken.items():
        message = f"{_FAULTS[name]} is not finite in {len(where)} of {number + 1} batches, first in batch {where[0]}"
        warnings.warn(message, stacklevel=2)
    return _summarise(torch.cat(sums), torch.cat(counts), names, resamples, seed)


def record_logits(model: Model, batches: Iterable[Batch], *, progress: bool = False) -> list[Tensor]:
    """The logits of a model for each batch, on the CPU in their own dtype: `[batch, seq, vocabulary]` each.

    As `reference` of many `evaluate` calls on the same batches they save running the reference each time. They
    take batch * seq * vocabulary * itemsize bytes per batch.
    """
    recorded = []
    with measuring(model):
        device = model_device(model)
        for number, batch in enumerate(each(batches, progress, "reference")):
            labels, inputs = split_targets(as_inputs(batch, number), number)
            recorded.append(logits_of(run_model(model, inputs, device), labels.shape, number).cpu())
    return recorded


def _reference_runs(given: Any) -> Iterator[Run]:
    """For each batch in turn, the function that gives the reference's output on its inputs."""
    if callable(given):
        return repeat(partial(run_model, given, device=model_device(given, "the reference")))
    if isinstance(given, Iterable):
        return (partial(_recorded, logits) for logits in given)
    raise TypeError(f"reference must be a model, a function or the logits of each batch, got {type(given).__name__}")


def _recorded(logits: Any, inputs: dict[str, Any]) -> Any:
    return logits


def _batch_sums(run: Run, other: Run | None, inputs: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
    """The measures of one batch: summed over the tokens that count `float64 [batch, measures]`, and their number."""
    labels, inputs = split_targets(inputs, number)
    targets, rows = labels[:, 1:], labels.shape[0]
    counted = targets != IGNORED
    counts = counted.sum(dim=1).cpu()
    totals = torch.zeros(rows, len(LOSS_ONLY if other is None else WITH_REFERENCE), dtype=torch.float64)
    if not counted.any():
        return totals, counts
    logits = logits_of(run(inputs), labels.shape, number)
    theirs = None
    if other is not None:
        theirs = logits_of(other(inputs), labels.shape, number, "the reference")
        if theirs.shape != logits.shape:
            sizes = f"{theirs.shape[-1]} entries, the model's {logits.shape[-1]}"
            raise ValueError(f"the reference's vocabulary has {sizes}: the two cannot be compared")
        theirs = theirs[:, :-1]
    measures = token_measures(logits[:, :-1], targets, counted, theirs).cpu()
    return totals.index_add_(0, counted.nonzero()[:, 0].cpu(), measures.double()), counts


def _summarise(sums: Tensor, counts: Tensor, names: tuple[str, ...], resamples: int, seed: int) -> Quality:
    used = counts > 0
    if not used.any():
        raise ValueError("no token counts: all targets are masked, or no sequence has two tokens")
    bounds = [_BOUNDS[name] for name in names]
    estimates = ratio_estimates(sums[used], counts[used], bounds, resamples=resamples, seed=seed)
    found = dict(zip(names, estimates, strict=True))
    return Quality(**found, perplexity=found["loss"].exp(), tokens=int(counts.sum()), sequences=int(used.sum()))
