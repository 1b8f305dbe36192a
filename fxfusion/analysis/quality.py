"""How well a causal language model predicts text: loss and perplexity, each with a 95 % interval.

The loss is the mean negative log-likelihood of the next token, in nats per token, over all tokens that count.
The interval comes from how sequences differ: the tokens of one sequence share a topic and are no independent
draws, while sequences are taken as such.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any]

_IGNORED = -100  # the label that means "do not count this token" in the whole PyTorch world
_NORMAL_95 = 1.959964
# Elements of the float32 logits held at once (64 MB); those of a long batch over 128k tokens take gigabytes.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval.

    `float(e)` and `f"{e:.2f}"` give the value, `str(e)` and `f"{e}"` all three numbers.
    """

    value: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def to_dict(self) -> dict[str, float | None]:
        """The three numbers; those that are not finite are None, so that the dict is valid JSON."""
        return {name: number if math.isfinite(number) else None for name, number in asdict(self).items()}


@dataclass(frozen=True)
class Quality:
    """What `evaluate` measured.

    `loss` is in nats per token; `perplexity` is `exp(loss)`, its interval `exp` of the loss's.
    `tokens` counts the predicted tokens, `sequences` the rows that hold at least one of them.
    """

    loss: Estimate
    perplexity: Estimate
    tokens: int
    sequences: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "loss": self.loss.to_dict(),
            "perplexity": self.perplexity.to_dict(),
            "tokens": self.tokens,
            "sequences": self.sequences,
        }


def evaluate(model: nn.Module | Callable[..., Any], batches: Iterable[Batch], progress: bool = False) -> Quality:
    """Measure the next-token loss of a causal language model.

    Args:
        model: a module (compiled or not) or function from `input_ids` to logits `[batch, seq, vocabulary]`:
            bare, first in a tuple, or as `.logits`. It runs in eval mode without gradients; afterwards every
            submodule has its own mode again.
        batches: `input_ids` tensors `[batch, seq]`, or dicts of model inputs. In a dict, a token counts only
            if `attention_mask` `[batch, seq]` is non-zero there and at the token before, and `labels`
            `[batch, seq]` (default: `input_ids`; not passed to the model) is not -100. Labels are aligned
            with the inputs: the shift by one happens here.
        progress: show a progress bar (needs `rich`).

    Returns:
        Loss and perplexity, computed in float32 whatever the model's dtype. The 95 % interval is a normal
        one: 1.96 times the standard error of a ratio (summed loss over token count, by sequence); from a
        single sequence it is unbounded. A loss that is NaN or infinite is returned as such, with a warning
        that names the first such batch.

    Raises:
        ValueError: no batches, no token that counts, a batch or logits of a wrong shape, a model on `meta`.
        TypeError: a batch that is neither a tensor nor a dict.
    """
    sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    number, broken = -1, []
    with torch.no_grad(), _eval_mode(model):
        device = _device(model)
        for number, batch in enumerate(_with_progress(batches, progress)):
            total, count = _batch_loss(model, _to_device(_as_inputs(batch, number), device), number)
            if not torch.isfinite(total).all():
                broken.append(number)
            sums.append(total.cpu())
            counts.append(count.cpu())
    if number < 0:
        raise ValueError("batches is empty: nothing to evaluate (a generator can be used up only once)")
    if broken:
        message = f"the loss is not finite in {len(broken)} of {number + 1} batches, first in batch {broken[0]}"
        warnings.warn(message, stacklevel=2)
    return _summarise(torch.cat(sums), torch.cat(counts))


def _batch_loss(model: nn.Module | Callable[..., Any], inputs: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
    """Summed loss (float64) and number of the tokens that count, each `[batch]`."""
    labels, inputs = _targets(inputs, number)
    targets, rows = labels[:, 1:], labels.shape[0]
    counted = targets != _IGNORED
    counts = counted.sum(dim=1)
    if not counted.any():
        return torch.zeros(rows, dtype=torch.float64), counts
    # A plain module may call its first argument something else, so a lone `input_ids` goes by position.
    output = model(inputs["input_ids"]) if inputs.keys() == {"input_ids"} else model(**inputs)
    logits = _logits(output, labels.shape, number)
    losses = _token_losses(logits[:, :-1], targets, counted)
    # Picked, not multiplied by the mask: a NaN in a token that does not count must not reach the sum.
    row = counted.nonzero()[:, 0].to(losses.device)
    totals = torch.zeros(rows, dtype=torch.float64, device=losses.device)
    return totals.index_add_(0, row, losses.double()), counts


def _token_losses(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Loss of each token that counts, row by row: `[tokens]`, float32. Converts a bounded part at a time."""
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    rows, columns = counted.to(logits.device).nonzero(as_tuple=True)
    wanted = targets.to(logits.device)[rows, columns]
    parts = [
        F.cross_entropy(logits[row, column].float(), target, reduction="none")
        for row, column, target in zip(rows.split(step), columns.split(step), wanted.split(step), strict=True)
    ]
    return torch.cat(parts)


def _summarise(sums: Tensor, counts: Tensor) -> Quality:
    """Ratio estimate over sequences: loss = sum of losses / number of tokens."""
    used = counts > 0
    sums, counts = sums[used], counts[used]
    sequences, tokens = len(sums), int(counts.sum())
    if tokens == 0:
        raise ValueError("no token counts: all targets are masked, or no sequence has two tokens")
    loss = float(sums.sum()) / tokens
    if sequences > 1:
        # Linearised standard error: a long sequence moves the ratio by more than a short one.
        residuals = sums - loss * counts
        variance = float(residuals.square().sum()) * sequences / (sequences - 1)
        margin = _NORMAL_95 * math.sqrt(variance) / tokens
    else:
        margin = math.inf
    low = loss if math.isnan(loss) else max(0.0, loss - margin)
    interval = Estimate(loss, low, loss + margin)
    perplexity = Estimate(_exp(interval.value), _exp(interval.low), _exp(interval.high))
    return Quality(interval, perplexity, tokens, sequences)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _as_inputs(batch: Any, number: int) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    raise TypeError(
        f"batch {number} must be a tensor [batch, seq] or a dict of model inputs, got {type(batch).__name__}"
        " (wrap a single batch in a list)"
    )


def _targets(inputs: dict[str, Any], number: int) -> tuple[Tensor, dict[str, Any]]:
    """Labels `[batch, seq]` with -100 wherever a token does not count, and the inputs without them."""
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    labels = inputs.get("input_ids") if labels is None else labels
    if not isinstance(labels, Tensor):
        raise ValueError(f"batch {number} has neither `input_ids` nor `labels`: it has {sorted(inputs)}")
    if labels.ndim != 2 or labels.is_floating_point():
        kind = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"batch {number} must hold integer token ids [batch, seq], got {kind}")
    mask = inputs.get("attention_mask")
    if mask is None:
        return labels, inputs
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        raise ValueError(
            f"the attention_mask of batch {number} must be [batch, seq] like its ids {list(labels.shape)},"
            f" got {list(getattr(mask, 'shape', [type(mask).__name__]))}"
        )
    counted = mask != 0
    # A token is predicted at the position before it: behind left padding that position saw nothing.
    counted[:, 1:] &= mask[:, :-1] != 0
    return labels.masked_fill(~counted, _IGNORED), inputs


def _logits(output: Any, shape: torch.Size, number: int) -> Tensor:
    """The logits `[batch, seq, vocabulary]` in whatever the model returned."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returned {type(output).__name__} for batch {number}: no logits in it")
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ValueError(
            f"the logits of batch {number} must be [batch, seq, vocabulary] for ids {list(shape)},"
            f" got {list(logits.shape)}"
        )
    return logits


def _device(model: nn.Module | Callable[..., Any]) -> torch.device | None:
    """Where the inputs belong: the device of the first parameter, None if there is none to ask."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is not None and weight.is_meta:
        raise ValueError("the model is on the meta device: its weights are missing")
    return None if weight is None else weight.device


def _to_device(inputs: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    if device is None:
        return inputs
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextmanager
def _eval_mode(model: nn.Module | Callable[..., Any]) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode after: a model may be frozen in parts."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _with_progress(batches: Iterable[Batch], progress: bool) -> Iterable[Batch]:
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, description="evaluate", total=len(batches) if isinstance(batches, Sized) else None)
