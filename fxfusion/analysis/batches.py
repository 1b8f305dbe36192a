"""Batches of token ids: which tokens count, and how a model is called on them.

A batch is a tensor of `input_ids` `[batch, seq]` or a dict of model inputs. Every measure that reads batches goes
through here, so that padding, labels and forms of output mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        raise ValueError(f"{who} is on the meta device: its weights are missing")
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
