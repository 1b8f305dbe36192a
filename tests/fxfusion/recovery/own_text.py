"""Tiny models that can predict something, and text of theirs: a refit refuses text that a model cannot predict."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.end_to_end.caching import decoder
from tests.end_to_end.family_table import family_named

DROPPED = (1, 2)
PLAN = {"dropped_attention": DROPPED, "groups": ((1, 2),)}
LENGTH = 24


@lru_cache
def _model(family: str) -> Any:
    model = decoder(family_named(family))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)  # sure of what it says
    return model


def model_of(family: str = "llama") -> Any:
    """Four layers, float32, with all its attention; a copy of its own."""
    return copy.deepcopy(_model(family))


@lru_cache
def own_text(family: str = "llama", batches: int = 6, rows: int = 16, seed: int = 0) -> tuple[Tensor, ...]:
    """`[rows, LENGTH]` each, drawn from the model itself."""
    torch.manual_seed(seed)
    starts = torch.randint(3, 97, (batches * rows, 1))
    found = _model(family).generate(
        starts, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1, do_sample=True, top_k=0, pad_token_id=0
    )
    return tuple(found.split(rows))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(value, before[name]) for name, value in now.items())
