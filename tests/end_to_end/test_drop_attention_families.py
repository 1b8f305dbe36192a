"""Families of transformers without some of their attention: equal to hand-made surgery, in every cache.

For each family and each choice of layers the reference is the intact model with a stub put in by hand, run on all
tokens at once. Cached decoding (growing cache, fixed cache, and one made without a config) must give its logits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import fxfusion
from fxfusion.models.drop_attention import drop_attention
from fxfusion.report import FusionReport
from tests.end_to_end.caching import (
    LENGTH,
    LIMIT,
    RED,
    cache_bytes,
    decoded,
    decoder,
    new_cache,
    off,
    recomputed,
    stubbed,
    token_ids,
)
from tests.end_to_end.families import Family, parallel_form, relative, remove_mixers, run
from tests.end_to_end.family_table import FAST, OUTPUT_NORM, REFUSED, VARIANTS, each
from tests.end_to_end.slow_families import SLOW

WINDOW = {"sliding_window": 4}
HYBRID = {"block_ff_dim": 48, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * 2}
SANDWICH = ("input_layernorm", "post_attention_layernorm")

KNOWN = {family.id: family for family in (*FAST, *VARIANTS, *OUTPUT_NORM, *REFUSED, *SLOW)}
"""Sliding windows here are 4 tokens long, shorter than the text and than what goes in at once."""

QUICK = (
    KNOWN["llama"],
    replace(KNOWN["gemma2"], config={"head_dim": 8, **WINDOW}),
    KNOWN["phi3"],
    Family(
        name="bloom",
        layers="transformer.h",
        mixers=("self_attention",),
        stub="same",
        norms=("input_layernorm",),
        config={"n_head": 4},
    ),
)

OTHERS = (
    replace(KNOWN["mistral"], config=WINDOW),
    KNOWN["qwen3"],
    KNOWN["smollm3"],
    Family(name="gemma3_text", norms=SANDWICH, config={"head_dim": 8, **WINDOW}),
    KNOWN["gpt2"],
    KNOWN["gpt_neo"],
    KNOWN["gpt_neox"],
    KNOWN["opt"],
    KNOWN["falcon"],
    KNOWN["falcon-two-norms"],
    replace(KNOWN["cohere2"], config=WINDOW),
    KNOWN["olmo2"],
    KNOWN["granite"],
    KNOWN["starcoder2"],
    KNOWN["mpt"],
    KNOWN["mixtral"],
    KNOWN["stablelm"],
    KNOWN["stablelm-parallel"],
    Family(name="gpt_oss", config={"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, **WINDOW}),
    replace(KNOWN["lfm2"], config=HYBRID),
)

CHOICES = ((0,), (1,), (3,), (0, 2))
"""First, middle, last, several."""


@lru_cache(maxsize=1)
def intact(family_id: str) -> Any:
    return decoder(next(family for family in (*QUICK, *OTHERS) if family.id == family_id))


def dropped(family: Family, layers: Sequence[int]) -> tuple[Any, Any]:
    """The family's model without some attention, and the same by hand."""
    model = intact(family.id)
    return drop_attention(copy.deepcopy(model), layers), stubbed(model, family, layers)


def check(family: Family, layers: Sequence[int]) -> None:
    """Logits without a cache and from every cache are those of the surgery by hand; they are not the intact model's."""
    model, by_hand = dropped(family, layers)
    ids = token_ids()
    reference = recomputed(by_hand, ids)
    assert off(recomputed(intact(family.id), ids), reference) > RED, "dropping attention changes too little to be seen"
    assert off(recomputed(model, ids), reference) < LIMIT
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in by_hand.named_parameters()}
    whole = intact(family.id)
    for kind in ("dynamic", "static", "bare"):
        if kind == "bare" and "conv" in (getattr(whole.config, "layer_types", None) or ()):
            continue  # hybrids need a cache that knows their layers
        cache = new_cache(kind, model)
        error = off(decoded(model, ids, cache), reference)
        assert error < LIMIT, f"{kind} cache, layers {layers}: off by {error:.2g}"
        # Prefill shorter than the window, and all at once.
        assert off(decoded(model, ids, new_cache(kind, model), prefill=2), reference) < LIMIT
        assert off(decoded(model, ids, new_cache(kind, model), prefill=LENGTH), reference) < LIMIT
        full = new_cache(kind, whole)
        decoded(whole, ids, full)
        if "conv" not in (getattr(whole.config, "layer_types", None) or ()):  # bytes count keys and values alone
            assert 0 < cache_bytes(cache) < cache_bytes(full)


@each((), (*QUICK, *OTHERS))
def test_first_middle_last_and_several_layers(family: Family) -> None:
    for layers in CHOICES:
        check(family, layers)


@each(QUICK, ())
def test_the_first_and_another_layer(family: Family) -> None:
    check(family, (0, 2))


# --- what a cache does --------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """Greedy tokens, each from a full computation."""
    for _ in range(count):
        ids = torch.cat([ids, recomputed(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@each(QUICK[:2], (KNOWN["gpt2"], KNOWN["opt"], OTHERS[0]))
def test_generate_gives_what_full_computation_gives(family: Family) -> None:
    model, by_hand = dropped(family, (0, 2))
    ids = token_ids(length=6)
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    expected = greedy(by_hand, ids, 6)
    assert not torch.equal(expected, greedy(intact(family.id), ids, 6))
    for given in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **settings, **given), expected)
    beams = [
        found.generate(ids, **settings, num_beams=3, output_scores=True, return_dict_in_generate=True, use_cache=cached)
        for found, cached in ((model, True), (by_hand, False))
    ]
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    assert off(beams[0].sequences_scores, beams[1].sequences_scores) < LIMIT


@each(QUICK[:1], (QUICK[1], KNOWN["gpt2"]))
def test_left_padding(family: Family) -> None:
    """A padded row gives what it gives alone."""
    model, by_hand = dropped(family, (0, 2))
    ids, pad = token_ids(), 3
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    alone = recomputed(by_hand, ids[1:, pad:])
    whole = recomputed(by_hand, ids[:1])
    for kind in ("dynamic", "static"):
        found = decoded(model, ids, new_cache(kind, model), mask=mask)
        assert off(found[1:, pad:], alone) < LIMIT
        assert off(found[:1], whole) < LIMIT
    unpadded = decoded(model, ids, new_cache("dynamic", model))
    assert off(unpadded[1:, pad:], alone) > RED, "padding changes nothing: the comparison shows nothing"


# --- the compiler -------------------------------------------------------------------------------------


def mixers(report: FusionReport, layers: str) -> set[int]:
    """Numbers of the layers in which a mixer is seen."""
    found = [refusal.layer for refusal in report.refusals if refusal.code.value == "token_mixing"]
    return {int(path.removeprefix(f"{layers}.").split(".")[0]) for path in found if path.startswith(layers)}


@each(QUICK[:1], (KNOWN["gpt2"], KNOWN["phi3"]))
def test_the_compiler_finds_the_chain(family: Family) -> None:
    """It fuses what is left, and that equals the parallel form of the surgery by hand, computed in eager."""
    torch._dynamo.reset()
    whole = decoder(family).to(torch.float64)
    model = drop_attention(copy.deepcopy(whole), [1, 2, 3])
    remove_mixers(whole, family)
    inputs = {"input_ids": token_ids(), "use_cache": False}
    report = fxfusion.explain(model, **inputs, policy={"include_leading": False})
    assert [len(group.members) for group in report.groups] == [3]
    assert mixers(report, family.layers) == {0}
    options = {"compiler": "eager", "verify": "numeric", "strict": True, "policy": {"include_leading": False}}
    fused = run(torch.compile(model, backend=fxfusion.ffn_fusion, options=options), inputs)
    assert relative(fused, parallel_form(whole, family, inputs)) <= family.limit
    assert relative(fused, run(model, inputs)) > RED, "the parallel form is too close to tell them apart"
    torch._dynamo.reset()
