"""Small random Llamas for checkpoints: intact, without some attention, and fused. Each call gives a copy."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

import fxfusion
from tests.end_to_end.caching import decoder, recomputed, token_ids
from tests.end_to_end.family_table import family_named

DROPPED = (1, 2, 3)
GROUPS = ((1, 2, 3),)


@lru_cache
def _intact() -> Any:
    model = decoder(family_named("llama"), attn_implementation="sdpa")
    model.set_attn_implementation("sdpa")
    return model


@lru_cache
def _dropped() -> Any:
    return fxfusion.drop_attention(intact(), DROPPED)


@lru_cache
def _fused(norm: str) -> Any:
    return fxfusion.fuse(intact(), {"dropped_attention": DROPPED, "groups": GROUPS, "norm": norm})


def intact() -> Any:
    """Four layers, float32, untied."""
    return copy.deepcopy(_intact())


def dropped() -> Any:
    return copy.deepcopy(_dropped())


def fused(norm: str = "fold") -> Any:
    return copy.deepcopy(_fused(norm))


def logits(model: Any) -> Tensor:
    return recomputed(model, token_ids())


def plain(folder: Path) -> Any:
    """The folder as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
