"""Decoding with a key-value cache, and what it must give: for models that lost some attention.

Nothing here uses fxfusion: the reference is the intact model with a stub put in by hand (`families.Stub`), run on
all tokens at once without a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from tests.end_to_end import families
from tests.end_to_end.families import Family, Stub, layers_of

LIMIT = 1e-4
"""Allowed difference of logits, as a part of the largest."""

RED = 1e-2
"""A comparison that must fail misses by more than this."""

LENGTH, PREFILL = 12, 7
"""Tokens, and how many of them go in at once; sliding windows in the tests are shorter than both."""


def decoder(family: Family, seed: int = 0, **config: Any) -> Any:
    """The family's random float32 model with all its attention, using its cache."""
    torch.manual_seed(seed)
    made = replace(family, config={**family.config, "use_cache": True, **config})
    model = families.build(made).to(torch.float32).eval()
    families.randomise(model, seed)
    return model


def token_ids(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def stubbed(model: nn.Module, family: Family, layers: Iterable[int]) -> nn.Module:
    """A copy of the intact model with stubs in the place of some attention, put in by hand."""
    copied = copy.deepcopy(model)
    for number in layers:
        layer = layers_of(copied, family)[number]
        for path in family.mixers:
            if hasattr(layer, path):
                arity = 0 if path == "conv" else family.arity
                layer.set_submodule(path, Stub(family.stub, arity))
        for path in family.norms:
            layer.set_submodule(path, nn.Identity())
    return copied


@torch.no_grad()
def recomputed(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of all tokens at once, without a cache."""
    logits: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return logits


@torch.no_grad()
def decoded(model: Any, ids: Tensor, cache: Any, prefill: int = PREFILL, mask: Tensor | None = None) -> Tensor:
    """Logits of the first tokens at once and the others one by one. `mask`: 0 where a token is padding."""
    logits = []
    done = 0
    for part in (ids[:, :prefill], *(ids[:, place : place + 1] for place in range(prefill, ids.shape[1]))):
        end = done + part.shape[1]
        given: dict[str, Any] = {}
        if mask is not None:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, done:end]
            given = {"attention_mask": mask[:, :end], "position_ids": places}
        logits.append(model(input_ids=part, past_key_values=cache, use_cache=True, **given).logits)
        done = end
    return torch.cat(logits, dim=1)


def new_cache(kind: str, model: Any, length: int = LENGTH) -> Any:
    """`dynamic` or `static`, built from the model's config as users do; `bare`: one that makes slots as they come."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


def cache_bytes(cache: Any) -> int:
    """What the cache stores: keys and values, and the states of convolutions and scans."""
    total = 0
    for slot in cache.layers:
        states: Mapping[int, Any] = {**getattr(slot, "conv_states", {}), **getattr(slot, "recurrent_states", {})}
        held = [getattr(slot, "keys", None), getattr(slot, "values", None), *states.values()]
        total += sum(value.numel() * value.element_size() for value in held if value is not None)
    return total


def off(value: Tensor, reference: Tensor) -> float:
    """Largest difference, as a part of the largest reference value."""
    assert value.shape == reference.shape and bool(torch.isfinite(reference).all())
    return float((value - reference).abs().max() / reference.abs().max())
