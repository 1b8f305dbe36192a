"""A fused model decodes with a cache, and `generate` writes what the same model writes without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfusion
from bench.reference import heldout_batches, load_model
from bench.whole_path import PLAN, assisted, greedy
from tests.end_to_end import caching
from tests.end_to_end.caching import LIMIT, RED, off
from tests.end_to_end.family_table import family_named

IDS = caching.token_ids()

# Layers whose attention goes, and those whose FFNs become one.
MIDDLE, FIRST = ([1, 2], [[1, 2]]), ([0, 1], [[0, 1]])


def fused(name: str, layers: tuple[list[int], list[list[int]]], **config: Any) -> Any:
    """A random float32 model of four layers, of which three are left."""
    model = caching.decoder(family_named(name), **config)
    dropped, groups = layers
    return fxfusion.fuse(model, fxfusion.FusionPlan(dropped_attention=dropped, groups=groups))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "config"),
    [
        ("llama", MIDDLE, {}),
        ("llama", FIRST, {}),  # no attention is left in layer 0, where a cache looks for its length
        ("gpt2", MIDDLE, {}),
        ("phi3", FIRST, {}),
        ("gemma", MIDDLE, {}),
        ("gpt_neox", MIDDLE, {}),
        ("mistral", MIDDLE, {"sliding_window": 5}),
        ("qwen2", FIRST, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_cached_decoding_gives_the_logits_of_the_full_computation(name: str, layers: Any, config: Any) -> None:
    model = fused(name, layers, **config)
    wanted = caching.recomputed(model, IDS)
    for kind in ("dynamic", "static"):
        cache = caching.new_cache(kind, model)
        assert off(caching.decoded(model, IDS, cache), wanted) <= LIMIT, kind
        assert caching.cache_bytes(cache) > 0
    other = IDS.clone()
    other[:, caching.PREFILL - 1] += 1  # what the cache holds of one token matters to all that come after
    later = slice(caching.PREFILL, None)
    decoded = caching.decoded(model, other, caching.new_cache("dynamic", model))
    assert off(decoded[:, later], wanted[:, later]) > RED


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The reference model intact, and fused from twelve layers to eight."""
    return load_model(), fxfusion.fuse(load_model(), PLAN)


def prompts(count: int, length: int = 32) -> Tensor:
    (found,) = heldout_batches(batch=count, seq=length, limit=1)
    return found


@pytest.mark.slow
def test_generate_writes_the_same_with_dynamic_and_static_caches_as_without(models: tuple[Any, Any]) -> None:
    intact, model = models
    ids = prompts(2)
    without = greedy(model, ids, new=24, use_cache=False)
    assert torch.equal(greedy(model, ids, new=24), without)
    assert torch.equal(greedy(model, ids, new=24, cache_implementation="static", disable_compile=True), without)
    assert not torch.equal(greedy(intact, ids, new=24), without)


@pytest.mark.slow
def test_beam_search_writes_the_same_with_a_cache_as_without(models: tuple[Any, Any]) -> None:
    _, model = models
    ids = prompts(2)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with_cache = greedy(model, ids, new=12, **beams)
    assert with_cache.shape == (4, 32 + 12)
    assert torch.equal(with_cache, greedy(model, ids, new=12, use_cache=False, **beams))
    assert not torch.equal(with_cache[::2], greedy(model, ids, new=12))


@pytest.mark.slow
def test_as_a_draft_it_gives_the_text_of_the_intact_model_in_fewer_calls(models: tuple[Any, Any]) -> None:
    intact, model = models
    for prompt in prompts(3).split(1):
        found = assisted(intact, model, prompt, new=32)
        assert torch.equal(found.text, greedy(intact, prompt, new=32))
        assert found.calls + found.accepted == 32
        assert 0.3 < found.accepted / found.proposed < 1.0  # more prompts: bench.whole_path --assisted


@pytest.mark.gpu
def test_compiled_decoding_on_a_gpu_writes_the_same(models: tuple[Any, Any]) -> None:
    model = models[1].cuda()
    ids = prompts(2).cuda()
    wanted = greedy(model, ids, new=24)
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    assert torch.equal(greedy(model, ids, new=24, cache_implementation="static", disable_compile=True), wanted)
