"""Batches of token ids: which tokens count, and how a model is called on them.

A batch is a tensor of `input_ids` `[batch, seq]` or a dict of model inputs. Every measure that reads batches goes
through here, so that padding, labels and forms of output mean the same everywhere. `TokenBatch`: for measures that
run the same text many times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.compiler.unwrap import offloaded

Batch = Tensor | Mapping[str, Any]
Model = nn.Module | Callable[..., Any]

_PROBE = 8  # tokens
# How much the logits may change, relative, when a later token does: a causal model's by so many roundings where experts
# see the tokens in another grouping, and in half precision by no more than this.
_ROUNDINGS, _CHANGED = 32, 0.05
IGNORED = -100  # the label that means "do not count this token" in the whole PyTorch world


def as_inputs(batch: Any, number: int) -> dict[str, Any]:
    """The batch as a new dict of model inputs. `number` names it in messages."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    raise TypeError(
        f"batch {number} must be a tensor [batch, seq] or a dict of model inputs, got {type(batch).__name__}"
        " (wrap a single batch in a list)"
    )


def split_targets(inputs: dict[str, Any], number: int) -> tuple[Tensor, dict[str, Any]]:
    """Labels `[batch, seq]` with -100 wherever a token does not count, and the inputs without them.

    A token counts only if `attention_mask` `[batch, seq]` is non-zero there and at the token before, and `labels`
    (default: `input_ids`) is not -100.
    """
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
    return labels.masked_fill(~counted, IGNORED), inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One batch. `inputs`: those of the model, without labels. `key`: digest of all that was given.

    `seen` `bool [batch, seq]`: tokens whose values count, neither padding nor labelled -100. `targets`
    `[batch, seq - 1]`: the next token at each position; `counted` likewise: whether its prediction counts.
    """

    number: int
    inputs: dict[str, Any]
    seen: Tensor
    targets: Tensor
    counted: Tensor
    key: str


def read_batches(batches: Iterable[Batch]) -> tuple[TokenBatch, ...]:
    """All batches, in order.

    Raises ValueError for no batches, token ids of a wrong shape, sequences of one token, or no token that
    counts; TypeError for a batch that is neither a tensor nor a dict.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of batches; wrap a single batch in a list")
    found = tuple(_read(batch, number) for number, batch in enumerate(batches))
    if not found:
        raise ValueError("batches is empty: nothing to measure on (a generator can be used up only once)")
    if not any(batch.counted.any() for batch in found):
        raise ValueError("no token counts: all of them are padding, or labelled -100, or alone in their sequence")
    return found


def _read(batch: Any, number: int) -> TokenBatch:
    given = as_inputs(batch, number)
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batch {number} must hold integer `input_ids` [batch, seq], got {kind}")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"batch {number} is {list(ids.shape)}: it takes a sequence of at least two tokens")
    labels, inputs = split_targets(given, number)
    if labels.shape != ids.shape:
        raise ValueError(f"the labels of batch {number} are {list(labels.shape)}, its ids {list(ids.shape)}")
    seen = torch.ones(ids.shape, dtype=torch.bool)
    for name, ignored in (("attention_mask", 0), ("labels", IGNORED)):
        if given.get(name) is not None:
            seen &= given[name].cpu() != ignored
    targets = labels[:, 1:].cpu()
    return TokenBatch(
        number=number, inputs=inputs, seen=seen, targets=targets, counted=targets != IGNORED, key=text_key([given])
    )


def text_key(batches: Iterable[Batch]) -> str:
    """Digest over everything in the batches, whatever device they are on."""
    digest = hashlib.sha256()
    given = [sorted(as_inputs(batch, number).items()) for number, batch in enumerate(batches)]
    for name, value in (one for inputs in given for one in inputs):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()[:16]


def run_model(model: Model, inputs: dict[str, Any], device: torch.device | None = None) -> Any:
    """Call the model. A plain module may call its first argument something else: lone `input_ids` go by position."""
    if device is not None:
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return model(inputs["input_ids"]) if inputs.keys() == {"input_ids"} else model(**inputs)


def logits_of(output: Any, shape: torch.Size, number: int, who: str = "the model") -> Tensor:
    """The logits `[batch, seq, vocabulary]` in whatever the model returned: bare, in a tuple, or as `.logits`."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, Tensor):
        raise ValueError(f"{who} returned {type(output).__name__} for batch {number}: no logits in it")
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ValueError(
            f"the logits that {who} gave for batch {number} must be [batch, seq, vocabulary] for ids {list(shape)},"
            f" got {list(logits.shape)}"
        )
    return logits


def model_device(model: Model, who: str = "the model") -> torch.device | None:
    """Where the inputs belong: the device of the first parameter, None if there is none to ask.

    Raises ValueError for a model that cannot be measured: its weights are missing, or it says that it is no causal
    language model (an encoder and decoder, a masked language model).
    """
    if not isinstance(model, nn.Module):
        return None
    can_generate = getattr(model, "can_generate", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or (can_generate and not can_generate()):
        raise ValueError(f"{who} ({type(model).__name__}) is not a causal language model")
    weight = next(model.parameters(), None)
    if weight is not None and weight.is_meta:
        why = offloaded(model)
        words = f"cannot be measured: {why}; load it whole" if why else "is on the meta device: its weights are missing"
        raise ValueError(f"{who} {words}")
    return None if weight is None else weight.device


def require_causal(model: nn.Module, batch: Batch) -> None:
    """Raises ValueError where the logits change with later tokens: an encoder may be loaded as a language model too.

    A few tokens of the batch are run twice, the last one changed. A batch of more than ids, mask and labels cannot be
    cut to a few tokens and is believed.
    """
    inputs = as_inputs(batch, 0)
    if inputs.keys() - {"input_ids", "attention_mask", "labels"} or not isinstance(inputs.get("input_ids"), Tensor):
        return
    ids = inputs["input_ids"][:1, :_PROBE]
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == 0, 1, ids[:, -1] - 1)
    device = model_device(model)
    with measuring(model):
        found = [logits_of(run_model(model, {"input_ids": each}, device), ids.shape, 0) for each in (ids, other)]
    before, after = (logits[:, :-1].double() for logits in found)
    finite = before.isfinite() & after.isfinite()  # what is not finite is somebody else's finding
    change = (before - after)[finite].norm()
    if change > min(_ROUNDINGS * torch.finfo(found[0].dtype).eps, _CHANGED) * before[finite].norm():
        name = type(model).__name__
        raise ValueError(f"{name} is not causal (its logits change with later tokens), so it has no perplexity")


@contextmanager
def measuring(*models: Any) -> Iterator[None]:
    """No gradients and eval mode inside; every submodule's own mode after: a model may be frozen in parts."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    modes = [(module, module.training) for module in modules]
    try:
        for model in models:
            if isinstance(model, nn.Module):
                model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
