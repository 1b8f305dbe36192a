"""surgery_proof: a right surgery passes, and each kind of wrong one is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxfusion.errors import SurgeryError
from fxfusion.models.surgery_proof import (
    PREFILL,
    TOKENS,
    CacheProof,
    Proof,
    cached_logits,
    check_same_graph,
    full_logits,
    proof_tokens,
    relative,
)
from fxfusion.models.traced import TracedGraph, TracedModel
from tests.fxfusion.models.odd_decoder import OddDecoder, odd_decoder


class Gives(nn.Module):
    """Stands where an attention was."""

    def __init__(self, value: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, past_key_values: object = None) -> tuple[object, None]:
        return self.value(x), None


@pytest.fixture(scope="module")
def intact() -> tuple[OddDecoder, TracedGraph, Tensor]:
    model = odd_decoder()
    ids = proof_tokens(model)
    return model, TracedModel(model).graph(ids), ids


def without(model: OddDecoder, value: Callable[[Tensor], object] = lambda x: 0, layer: int = 1) -> OddDecoder:
    """A copy whose layer has a stub for its attention; the norm before it is left as it is."""
    changed = copy.copy(model)
    changed.__dict__ = {**vars(model), "_modules": dict(model._modules)}
    changed.blocks = nn.ModuleList(model.blocks)
    changed.blocks[layer] = copy.copy(model.blocks[layer])
    changed.blocks[layer].__dict__ = {**vars(model.blocks[layer]), "_modules": dict(model.blocks[layer]._modules)}
    changed.blocks[layer].mix = Gives(value)
    return changed


WRONG = {
    "the stream twice": lambda model: without(model, lambda x: x),
    "another layer": lambda model: without(model, layer=2),
    "the intact model": lambda model: model,
    "a weight that differs": lambda model: with_other_weight(without(model)),
}


def with_other_weight(model: OddDecoder) -> OddDecoder:
    model.head = copy.deepcopy(model.head)
    with torch.no_grad():
        model.head.weight[0, 0] += 0.1
    return model


def test_the_right_surgery_is_proved(intact: tuple[OddDecoder, TracedGraph, Tensor]) -> None:
    model, graph, ids = intact
    removed = graph.blocks.mixers_of([1])
    proof = Proof.of_intact(model, graph, removed, ids)
    proof.check_logits(without(model))
    proof.check_logits(without(model, torch.zeros_like))
    check_same_graph(without(model), graph, removed, ids)
    check_same_graph(without(model, torch.zeros_like), graph, removed, ids)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_surgery_is_noticed(wrong: str, intact: tuple[OddDecoder, TracedGraph, Tensor]) -> None:
    model, graph, ids = intact
    removed = graph.blocks.mixers_of([1])
    changed = WRONG[wrong](model)
    with pytest.raises(SurgeryError, match="the logits are off by"):
        Proof.of_intact(model, graph, removed, ids).check_logits(changed)
    with pytest.raises(SurgeryError, match="something else than its graph"):
        check_same_graph(changed, graph, removed, ids)


def test_the_graphs_are_compared_on_the_meta_device() -> None:
    model = odd_decoder().to("meta")
    ids = proof_tokens(model)
    assert ids.is_meta
    graph = TracedModel(model).graph(ids)
    removed = graph.blocks.mixers_of([3])
    check_same_graph(without(model, layer=3), graph, removed, ids)
    with pytest.raises(SurgeryError):
        check_same_graph(without(model, layer=2), graph, removed, ids)


def test_graph_breaks_are_noticed(intact: tuple[OddDecoder, TracedGraph, Tensor]) -> None:
    model, graph, ids = intact

    def breaking(x: Tensor) -> int:
        torch._dynamo.graph_break()
        return 0

    with pytest.raises(SurgeryError, match="not one graph any more"):
        check_same_graph(without(model, breaking), graph, graph.blocks.mixers_of([1]), ids)


# --- caches -------------------------------------------------------------------------------------------


def test_cached_decoding_is_compared_with_the_full_computation() -> None:
    model = odd_decoder()
    ids = proof_tokens(model)
    full, cached = full_logits(model, ids), cached_logits(model, ids)
    assert cached is not None and relative(cached, full) < 1e-6
    proof = CacheProof(ids, 0.0)
    proof.check(model)
    model.blocks[2].mix.layer_idx = 3
    with pytest.raises(SurgeryError, match="cached decoding is off by"):
        proof.check(model)
    CacheProof(ids, None).check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_judged_by_what_the_intact_model_does(dtype: torch.dtype) -> None:
    model = odd_decoder().to(dtype)
    ids = proof_tokens(model)
    graph = TracedModel(model).graph(ids)
    proof = Proof.of_intact(model, graph, graph.blocks.mixers_of([1]), ids)
    assert proof.cache.error is not None and proof.cache.error < 0.02
    changed = without(model)
    proof.check_logits(changed)
    proof.cache.check(changed)
    changed.blocks[2].mix.layer_idx = 3
    with pytest.raises(SurgeryError, match="cached decoding is off by"):
        proof.cache.check(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_few_percent_in_the_logits_are_noticed_in_half_precision_too(dtype: torch.dtype) -> None:
    model = odd_decoder().to(dtype)
    ids = proof_tokens(model)
    graph = TracedModel(model).graph(ids)
    proof = Proof.of_intact(model, graph, graph.blocks.mixers_of([1]), ids)
    changed = without(model)
    proof.check_logits(changed)
    changed.head = copy.deepcopy(changed.head)
    with torch.no_grad():
        changed.head.weight *= 1.05
    with pytest.raises(SurgeryError, match="the logits are off by"):
        proof.check_logits(changed)


def test_a_model_whose_own_cache_does_not_work_is_refused() -> None:
    model = odd_decoder(form="forgetful")
    ids = proof_tokens(model)
    graph = TracedModel(model).graph(ids)
    with pytest.raises(SurgeryError, match="cached decoding of the unchanged model is off by .*check=False"):
        Proof.of_intact(model, graph, graph.blocks.mixers_of([1]), ids)


def test_a_model_whose_own_cache_fails_is_refused() -> None:
    model = odd_decoder()
    ids = proof_tokens(model)
    graph = TracedModel(model).graph(ids)
    model.blocks[0].mix.layer_idx = 99
    with pytest.raises(SurgeryError, match="cached decoding of the unchanged model fails"):
        Proof.of_intact(model, graph, (), ids)


def test_a_model_without_a_cache_has_nothing_to_prove() -> None:
    model = odd_decoder()
    del model.config.use_cache
    assert cached_logits(model, proof_tokens(model)) is None


def test_past_tokens_kept_in_another_way_are_refused() -> None:
    class Other(OddDecoder):
        def forward(self, input_ids: Tensor, state: object = None) -> object:  # type: ignore[override]
            return super().forward(input_ids)

    model = Other(odd_decoder().config)
    with pytest.raises(SurgeryError, match="Other keeps past tokens in another way"):
        cached_logits(model, proof_tokens(model))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    model = odd_decoder()
    ids = proof_tokens(model)
    graph = TracedModel(model).graph(ids)
    for block in model.blocks:
        block.mix.forward = lambda x, past_key_values=None: (x.mean(1, keepdim=True).expand_as(x), None)
    with pytest.raises(SurgeryError, match="not causal"):
        Proof.of_intact(model, graph, (), ids)


# --- tokens and distances -----------------------------------------------------------------------------


def test_tokens_are_always_the_same_and_none_is_special() -> None:
    model = odd_decoder()
    model.config.pad_token_id, model.config.eos_token_id = 3, [5]
    state = torch.random.get_rng_state()
    ids = proof_tokens(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ids.shape == (2, TOKENS) and PREFILL < TOKENS - 1
    assert torch.equal(ids, proof_tokens(model)) and int(ids.max()) < 97
    assert not (ids == 3).any()
    assert len(ids.unique()) > TOKENS


def test_distance_is_relative_to_what_tells_tokens_apart() -> None:
    logits = torch.randn(2, 3, 50)
    assert relative(logits, logits) == 0
    assert relative(logits + 100, logits + 100.1) == pytest.approx(0.1, rel=0.1)
    assert relative(logits * 1.01, logits) == pytest.approx(0.01, rel=0.1)
