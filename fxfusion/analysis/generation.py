"""Do two models write the same text? Greedy continuations of the same prompts, token by token.

Errors add up when a model reads what it wrote itself, so this sees what perplexity and multiple-choice tests hide:
in FFN Fusion (arXiv 2503.18908, table 4) fusing the last FFN of a run costs nothing there, but breaks generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fxfusion.analysis.batches import Model, logits_of, measuring, model_device, run_model
from fxfusion.analysis.intervals import FRACTION, Estimate, mean_estimate, ratio_estimates
from fxfusion.report.plain import lines
from fxfusion.report.progress import each

Prompt = str | Tensor | Sequence[int] | Mapping[str, Any]
Ids = tuple[int, ...]

_MASKED_INPUTS = {"input_ids", "attention_mask", "labels"}
_CAUSAL_TOLERANCE = 1e-3  # relative; a causal model differs by nothing, or by the rounding of other kernels


@dataclass(frozen=True)
class Sample:
    """One prompt and both continuations, as token ids and, where there is a tokenizer, as text.

    The first `agreed` tokens of the continuations are the same.
    """

    prompt: Ids
    model: Ids
    reference: Ids
    agreed: int
    prompt_text: str | None = None
    model_text: str | None = None
    reference_text: str | None = None


@dataclass(frozen=True)
class GreedyAgreement:
    """What `greedy_agreement` measured.

    `length` is the number of tokens before the first difference (all of the continuation, where there is none),
    mean over prompts. `share` is the same as a fraction of the reference's tokens: 1 for the same model.
    `equal` is the fraction of prompts whose whole continuations are the same.
    """

    length: Estimate
    share: Estimate
    equal: Estimate
    prompts: int
    max_new_tokens: int
    samples: tuple[Sample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON."""
        estimates = {name: getattr(self, name).to_dict() for name in ("length", "share", "equal")}
        samples = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(sample).items()}
            for sample in self.samples
        ]
        return {**estimates, "prompts": self.prompts, "max_new_tokens": self.max_new_tokens, "samples": samples}

    def __str__(self) -> str:
        rows = [("tokens before the first difference", self.length), ("share of the reference's", self.share)]
        rows += [("whole texts that are equal", self.equal)]
        return lines(rows, f"greedily, {self.max_new_tokens} tokens at most after each of {self.prompts} prompts")


def greedy_agreement(
    model: Model,
    reference: Model,
    prompts: Iterable[Prompt],
    max_new_tokens: int = 64,
    *,
    batch: int = 8,
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    samples: int = 3,
    progress: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> GreedyAgreement:
    """Let both models continue each prompt greedily, each reading its own tokens, and compare.

    Args:
        model: a transformers model runs its own `generate` with a key-value cache, without any penalty or sampling
            that its generation config may ask for. Any other module or function from ids `[batch, seq]` to logits
            recomputes everything for each token, at one shape per prompt length, so that it compiles once.
            `torch.compile(model)` counts as such: its `generate` would run the module that is not compiled.
        reference: what to compare with, likewise.
        prompts: ids `[seq]` each, tensors `[rows, seq]`, dicts with `input_ids` and `attention_mask`, or texts
            (these need a tokenizer). Padding is removed first; prompts of one length run together.
        max_new_tokens: length of the continuations, unless an end-of-text token comes first.
        batch: how many prompts run together.
        eos_token_id: what ends a continuation (it counts as a token of it). None: what the reference's generation
            config says, or else the model's; an empty list: nothing does.
        tokenizer: turns texts into ids and the samples back into text.
        samples: how many of the first prompts to keep, with both continuations.
        progress: say how far it is, on the error stream.
        resamples, seed: of the bootstrap over prompts.

    Raises:
        ValueError: no prompts, an empty one, padding in its middle, `max_new_tokens` below 1, NaN among the logits, a
            model whose logits depend on later tokens.
        TypeError: a prompt of another type.
    """
    if max_new_tokens < 1 or batch < 1:
        raise ValueError(f"max_new_tokens and batch must be at least 1, got {max_new_tokens} and {batch}")
    rows = _all_rows(prompts, tokenizer)
    stops = _stops(eos_token_id, reference, model)
    found: dict[int, tuple[Ids, Ids]] = {}
    with measuring(model, reference):
        writers = [_writer(each, name) for each, name in ((model, "the model"), (reference, "the reference"))]
        for numbers in each(_groups(rows, batch), progress, "generate"):
            ids = torch.stack([rows[number] for number in numbers])
            ours, theirs = ([_cut(row, stops) for row in write(ids, max_new_tokens, stops)] for write in writers)
            found.update(zip(numbers, zip(ours, theirs, strict=True), strict=True))
    pairs = [found[number] for number in range(len(rows))]
    agreed = [_common(*pair) for pair in pairs]
    lengths = torch.tensor(agreed, dtype=torch.float64)
    written = torch.tensor([len(theirs) for _, theirs in pairs])
    equal = torch.tensor([float(ours == theirs) for ours, theirs in pairs])
    draws = {"resamples": resamples, "seed": seed}
    kept = zip(rows[:samples], pairs, agreed, strict=False)
    return GreedyAgreement(
        length=mean_estimate(lengths, (0.0, float(max_new_tokens)), **draws),
        share=ratio_estimates(lengths[:, None], written, [FRACTION], **draws)[0],
        equal=mean_estimate(equal, FRACTION, **draws),
        prompts=len(rows),
        max_new_tokens=max_new_tokens,
        samples=tuple(_sample(row, *pair, same, tokenizer) for row, pair, same in kept),
    )


def _all_rows(prompts: Iterable[Prompt], tokenizer: Any) -> list[Tensor]:
    rows = [row for number, prompt in enumerate(prompts) for row in _rows(prompt, number, tokenizer)]
    if not rows:
        raise ValueError("there are no prompts to continue (a generator can be used up only once)")
    return rows


def _rows(prompt: Prompt, number: int, tokenizer: Any) -> Iterator[Tensor]:
    """The prompts in one item, without padding: `int64 [seq]` each."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"prompt {number} is a text: give a tokenizer")
        prompt = tokenizer(prompt)["input_ids"]
    mask = None
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt or not prompt.keys() <= _MASKED_INPUTS:
            raise ValueError(f"prompt {number} must hold input_ids and attention_mask alone, it has {sorted(prompt)}")
        mask, prompt = prompt.get("attention_mask"), prompt["input_ids"]
    if not isinstance(prompt, Tensor | Sequence):
        raise TypeError(f"prompt {number} must be token ids or a text, got {type(prompt).__name__}")
    ids = torch.as_tensor(prompt)
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask) != 0
    if ids.numel() and (ids.is_floating_point() or ids.ndim not in (1, 2) or kept.shape != ids.shape):
        kind = f"{ids.dtype} {list(ids.shape)}, mask {list(kept.shape)}"
        raise ValueError(f"prompt {number} must be integer token ids [seq] or [rows, seq], got {kind}")
    for row, real in zip(torch.atleast_2d(ids), torch.atleast_2d(kept), strict=True):
        places = real.nonzero()[:, 0]
        if not len(places):
            raise ValueError(f"prompt {number} has no token")
        if int(places[-1] - places[0]) + 1 != len(places):
            raise ValueError(f"prompt {number} has padding between its tokens")
        yield row[real].to(torch.int64)


def _groups(rows: list[Tensor], batch: int) -> list[list[int]]:
    """Numbers of the prompts that run together: they have one length, so that none needs padding."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    return [same[start : start + batch] for same in by_length.values() for start in range(0, len(same), batch)]


def _stops(given: int | Sequence[int] | None, *models: Model) -> list[int]:
    """The tokens that end a continuation. Both models get the same, whatever their own configs say."""
    for model in models:
        if given is None:
            given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return []
    return [given] if isinstance(given, int) else [int(token) for token in given]


Writer = Callable[[Tensor, int, list[int]], list[list[int]]]


def _writer(model: Any, who: str) -> Writer:
    """What continues ids `[batch, seq]` greedily: rows of new tokens, possibly longer than up to their stop."""
    device = model_device(model, who)
    own = getattr(getattr(model, "generate", None), "__self__", None) is model
    if own and hasattr(model, "generation_config"):
        return lambda ids, limit, stops: _generate(model, ids.to(device or ids.device), limit, stops, who)
    return lambda ids, limit, stops: _write(model, ids, limit, stops, who, device)


def _generate(model: Any, ids: Tensor, limit: int, stops: list[int], who: str) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList

    def refuse_nan(_: Tensor, scores: Tensor) -> Tensor:
        return _checked(scores, who)

    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,  # for rows that have stopped; `_cut` removes it
    )
    with _generation_config(model, config):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([refuse_nan]),
        )
    rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return rows


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """The model's own config would fill in what ours leaves open: penalties, forced tokens, a kind of cache."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _write(
    model: Model, ids: Tensor, limit: int, stops: list[int], who: str, device: torch.device | None
) -> list[list[int]]:
    """The same by argmax alone. The ids have their final length from the start: later ones are not read."""
    rows, start = ids.shape
    ids = torch.cat([ids, ids.new_zeros(rows, limit)], dim=1)

    def logits(at: int) -> Tensor:
        output = run_model(model, {"input_ids": ids}, device)
        return _checked(logits_of(output, ids.shape, 0, who)[:, at], who)

    _require_causal(logits, ids, start, who)
    stopped = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    for place in range(start, start + limit):
        ids[:, place] = logits(place - 1).argmax(dim=-1).to(ids.device)
        stopped |= torch.isin(ids[:, place], torch.tensor(stops, dtype=ids.dtype, device=ids.device))
        if stopped.all():
            break
    written: list[list[int]] = ids[:, start:].tolist()
    return written


def _require_causal(logits: Callable[[int], Tensor], ids: Tensor, start: int, who: str) -> None:
    """Raise where the logits of the last prompt token change with the tokens behind it."""
    before = logits(start - 1).float()
    ids[:, start:] = 1
    after = logits(start - 1).float()
    ids[:, start:] = 0
    finite = before.isfinite() & after.isfinite()  # a token that a model never allows has -inf
    before, after = before[finite], after[finite]
    if float((before - after).abs().max()) > _CAUSAL_TOLERANCE * float(before.abs().max()):
        raise ValueError(f"{who} is not causal: its logits change with later tokens, so it cannot write text")


def _checked(logits: Tensor, who: str) -> Tensor:
    if logits.isnan().any():
        raise ValueError(f"the logits of {who} are NaN during generation: there is no most likely token")
    return logits


def _cut(row: list[int], stops: list[int]) -> Ids:
    """Up to the first stop, which is kept."""
    end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
    return tuple(row[:end])


def _common(ours: Ids, theirs: Ids) -> int:
    shorter = min(len(ours), len(theirs))
    return next((place for place in range(shorter) if ours[place] != theirs[place]), shorter)


def _sample(prompt: Tensor, ours: Ids, theirs: Ids, agreed: int, tokenizer: Any) -> Sample:
    ids = (tuple(prompt.tolist()), ours, theirs)
    if tokenizer is None:
        return Sample(*ids, agreed)
    return Sample(*ids, agreed, *(tokenizer.decode(list(part)) for part in ids))
