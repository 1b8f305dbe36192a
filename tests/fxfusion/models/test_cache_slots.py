"""cache_slots: every survivor has a slot of its own kind, and slots 0..k-1 are all in use."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from fxfusion.errors import SurgeryError
from fxfusion.models import cache_slots
from fxfusion.models.cache_slots import CacheSlots, plan_slots

S, F, M = "sliding_attention", "full_attention", "linear_attention"
MIXES = [None, (F,) * 5, (S, F, S, F, S), (S, S, S, F, F), (M, F, M, M, F), (F, S, M, S, F)]


def kept_sets(layers: int) -> list[tuple[int, ...]]:
    return [kept for count in range(1, layers + 1) for kept in itertools.combinations(range(layers), count)]


@pytest.mark.parametrize("types", MIXES)
def test_survivors_fill_the_first_slots_and_keep_their_types(types: tuple[str, ...] | None) -> None:
    for kept in kept_sets(5):
        planned = plan_slots(kept, 5, types, fixed_types=False)
        assert sorted(planned.slots[layer] for layer in kept) == list(range(len(kept)))
        assert [layer for layer, slot in enumerate(planned.slots) if slot is not None] == list(kept)
        assert planned.unused == tuple(range(len(kept), 5))
        if types is None:
            assert planned.layer_types is None
            continue
        assert planned.layer_types is not None
        for layer in kept:
            assert planned.layer_types[layer] == types[layer], "a surviving layer would get another mask"
            assert planned.layer_types[planned.slots[layer]] == types[layer], "a survivor would get another slot"
        used = planned.layer_types[: len(kept)]
        for place, found in enumerate(planned.layer_types):
            first = planned.layer_types.index(found)
            assert first < len(kept), f"type {found} is met first in unused slot {place}: {used}"


def test_slots_are_in_order_where_types_allow() -> None:
    assert plan_slots([1, 2, 4], 5, None, False).slots == (None, 0, 1, None, 2)
    assert plan_slots([1, 3], 4, (S, F, S, F), False) == CacheSlots((None, 0, None, 1), (F, F, F, F))
    moved = plan_slots([1, 2, 4, 5], 6, (F, S, F, S, F, S), False)
    assert moved == CacheSlots((None, 1, 2, None, 0, 3), (F, S, F, S, F, S))


def test_types_that_cannot_be_set_keep_every_slot() -> None:
    assert plan_slots([1, 3], 4, (M, F, M, F), True) == CacheSlots((None, 1, None, 3), (M, F, M, F))
    assert plan_slots([1, 3], 4, (F, F, F, F), True).slots == (None, 0, None, 1)


def test_no_survivor_leaves_the_types_alone() -> None:
    assert plan_slots([], 2, (F, S), False) == CacheSlots((None, None), (F, S))


# --- attributes ---------------------------------------------------------------------------------------


def module(**values: Any) -> nn.Module:
    made = nn.Module()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_the_attribute_that_counts_the_layers_is_found() -> None:
    mixers = {
        layer: [module(layer_id=layer, num_heads=layer, layers=4), module(layer_idx=layer, layer_flag=True)]
        for layer in range(3)
    }
    now = {layer: layer for layer in range(3)}
    assert cache_slots.index_attributes(mixers, now) == ("layer_id", "layer_idx")
    assert cache_slots.index_attributes(mixers, {0: 0, 1: 2, 2: 1}) == ()
    mixers[1].append(module(layer_idx=7))
    assert cache_slots.index_attributes(mixers, now) == ("layer_id",)


def test_changes_can_be_undone() -> None:
    config = LlamaConfig(num_hidden_layers=3)
    before = dict(vars(config))
    mixers = {1: [module(layer_idx=1, layer_name="b")], 2: [module(layer_idx=2)]}
    slots = plan_slots([1, 2], 3, None, False)
    with ExitStack() as undo:
        cache_slots.set_slots(mixers, ["layer_idx"], slots, undo)
        cache_slots.set_config([config], slots, undo)
        assert [mixers[layer][0].layer_idx for layer in (1, 2)] == [0, 1]
        assert config.kv_sharing_modes == [None, None, "reuse"]
    assert [mixers[layer][0].layer_idx for layer in (1, 2)] == [1, 2]
    assert mixers[1][0].layer_name == "b"
    assert vars(config) == before


# --- caches -------------------------------------------------------------------------------------------


def config_of(*types: str, **settings: Any) -> LlamaConfig:
    config = LlamaConfig(num_hidden_layers=len(types), sliding_window=8, **settings)
    config.layer_types = list(types)
    return config


def test_unused_slots_store_nothing_in_any_cache() -> None:
    config = config_of(F, S, F, S)
    slots = plan_slots([1, 2], 4, (F, S, F, S), False)
    with ExitStack() as undo:
        before = cache_slots.new_cache(config)
        cache_slots.set_config([config], slots, undo)
        cache_slots.check_slots(config, before, range(4), slots)
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)):
            assert [hasattr(slot, "lazy_initialization") for slot in cache.layers] == [True, True, False, False]
            assert cache.is_sliding[:2] == [False, True]


def test_a_slot_of_another_kind_is_refused() -> None:
    config = config_of(F, S, F)
    before = cache_slots.new_cache(config)
    with pytest.raises(SurgeryError, match="layer 1 would get a cache slot of another kind"):
        cache_slots.check_slots(config, before, range(3), CacheSlots((None, 0, 1), (F, S, F)))


def test_a_window_of_another_length_is_refused() -> None:
    before = cache_slots.new_cache(config_of(S, S))
    other = config_of(S, S)
    other.sliding_window = 9
    with pytest.raises(SurgeryError, match="'sliding_window': 9.* instead of .*'sliding_window': 8"):
        cache_slots.check_slots(other, before, range(2), CacheSlots((None, 0), (S, S)))


def test_a_hole_that_could_store_something_is_refused() -> None:
    config = config_of(F, S, F, S)
    with pytest.raises(SurgeryError, match="slot 0 would stay empty among used ones"):
        cache_slots.check_slots(config, cache_slots.new_cache(config), range(4), CacheSlots((None, 1, None, 3), None))


def test_a_hybrid_must_keep_something_that_counts_tokens() -> None:
    config = config_of(M, F, M)
    slots = plan_slots([0, 2], 3, (M, F, M), False)
    before = cache_slots.new_cache(config)
    with ExitStack() as undo, pytest.raises(SurgeryError, match="keeps no count of tokens"):
        cache_slots.set_config([config], slots, undo)
        cache_slots.check_slots(config, before, range(3), slots)


def test_layers_that_share_keys_and_values_are_refused() -> None:
    cache_slots.refuse_sharing([LlamaConfig(), LlamaConfig(num_kv_shared_layers=0)])
    for settings in ({"num_kv_shared_layers": 2}, {"kv_sharing_modes": [None, "reuse"]}):
        with pytest.raises(SurgeryError, match="use the keys and values of others"):
            cache_slots.refuse_sharing([LlamaConfig(**settings)])


def test_the_configs_of_the_decoder_are_found_once() -> None:
    config, tower = LlamaConfig(num_hidden_layers=2), LlamaConfig(num_hidden_layers=2)
    model, inner = module(config=config), module(config=config)
    inner.add_module("layers", nn.ModuleList([module(config=config), module()]))
    model.add_module("model", inner)
    model.add_module("vision", module(config=tower))
    assert cache_slots.decoder_configs(model, "model.layers", 2) == [config]
    with pytest.raises(SurgeryError, match="no config .* 3 decoder layers"):
        cache_slots.decoder_configs(model, "model.layers", 3)


def test_computed_attributes_are_known() -> None:
    class Computed(SimpleNamespace):
        @property
        def layer_types(self) -> list[str]:
            return [F]

    assert cache_slots.is_computed(Computed(), "layer_types")
    assert not cache_slots.is_computed(LlamaConfig(), "layer_types")
