"""The text of a refit: what is fitted to, what decides, and whether it is fit for that."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxfusion.analysis.batches import Batch, Model, TokenBatch, read_batches
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.errors import FxFusionError, OptionError

_EVERY = 8  # one sequence in so many decides, where no text for validation is given
_TOKENS_PER_CHANNEL = 4  # calibration tokens under which a layer of so many channels is likely to be overfitted
_CHECKED = 4_096  # calibration tokens that the intact model is measured on at most, in batches from all of the text
_NOISE = 0.8  # times ln(vocabulary): text that the intact model predicts no better than this tells nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """`given`: the batches as they came, for measures; `read`: the same, ready to be run."""

    fit: tuple[TokenBatch, ...]
    decide: tuple[TokenBatch, ...]
    fit_given: tuple[Batch, ...]
    decide_given: tuple[Batch, ...]

    @classmethod
    def of(cls, batches: Iterable[Batch], validation: Iterable[Batch] | None) -> Texts:
        """Raises `OptionError` where there is too little to be divided, `ValueError` and `TypeError` as of
        `read_batches`."""
        if isinstance(batches, Tensor) or isinstance(validation, Tensor):
            raise TypeError("batches must be an iterable of batches; wrap a single batch in a list")
        given = tuple(batches)
        read_batches(given)  # before anything is divided
        fit, decide = _divided(given) if validation is None else (given, tuple(validation))
        return cls(fit=read_batches(fit), decide=read_batches(decide), fit_given=fit, decide_given=decide)

    @property
    def tokens(self) -> int:
        """Calibration tokens that count."""
        return sum(int(batch.seen.sum()) for batch in self.fit)

    @property
    def fingerprint(self) -> str:
        """Digest over all text."""
        keys = " ".join([*(batch.key for batch in self.fit), "|", *(batch.key for batch in self.decide)])
        return hashlib.sha256(keys.encode()).hexdigest()[:16]

    def check_width(self, width: int, name: str) -> None:
        """Warn where a layer has too many channels for so few tokens."""
        if self.tokens < _TOKENS_PER_CHANNEL * width:
            warnings.warn(
                f"{self.tokens:,} calibration tokens are few for the {width:,} channels of {name}: at least "
                f"{_TOKENS_PER_CHANNEL * width:,} are better ({_TOKENS_PER_CHANNEL} for each channel)",
                stacklevel=2,
            )

    def check_language(self, model: Model, vocabulary: int) -> Quality:
        """The intact model's quality on the calibration text. Raises `OptionError` for text that it cannot predict,
        `FxFusionError` where its loss is not finite."""
        found = evaluate(model, _spread(self.fit_given, self.tokens), resamples=100)
        check_loss(float(found.loss), vocabulary)
        return found


def _spread(given: Sequence[Batch], tokens: int) -> Sequence[Batch]:
    """Batches at even distances, of no more than the tokens that are checked."""
    count = max(1, min(len(given), len(given) * _CHECKED // max(tokens, 1)))
    return [given[number * len(given) // count] for number in range(count)]


def check_loss(loss: float, vocabulary: int) -> None:
    """Raises `OptionError` where the intact model's loss on a text [nats per token] says that it cannot predict it,
    `FxFusionError` where the loss is not finite."""
    most = _NOISE * math.log(vocabulary)
    if not math.isfinite(loss):
        raise FxFusionError("the intact model's loss on this text is not finite: nothing can be fitted to it")
    if loss > most:
        raise OptionError(
            f"batches: the intact model's loss on this text is {loss:.3g} nats per token, more than {most:.3g} "
            f"({_NOISE} ln of {vocabulary:,} tokens): noise, or another language than the model's"
        )


def _divided(given: Sequence[Batch]) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Whole batches where there are enough of them, else rows of each."""
    if len(given) >= _EVERY // 2:
        step = min(_EVERY, len(given))
        decides = [number % step == step - 1 for number in range(len(given))]
        one = tuple(batch for batch, other in zip(given, decides, strict=True) if not other)
        return one, tuple(batch for batch, other in zip(given, decides, strict=True) if other)
    rows = sum(_rows_of(batch) for batch in given)
    if rows < 2:
        raise OptionError("batches: one sequence cannot be fitted to and decide too; give more, or `validation=`")
    fit, decide = [], []
    for batch in given:
        count = _rows_of(batch)
        cut = count - max(1, count // _EVERY) if count > 1 else count
        fit.append(_part(batch, slice(0, cut), count))
        if cut < count:
            decide.append(_part(batch, slice(cut, count), count))
    if not decide:  # batches of one sequence each
        return tuple(fit[:-1]), tuple(fit[-1:])
    return tuple(fit), tuple(decide)


def _rows_of(batch: Any) -> int:
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    return int(ids.shape[0])


def _part(batch: Any, rows: slice, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows]
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
        for name, value in batch.items()
    }
