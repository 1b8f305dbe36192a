"""stubs: which modules are an FFN's own, and what stands in for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.ffn_surgery.stubs import FfnSite, FfnStubs, NoFfn, find_ffn_sites
from fxfusion.models.no_attention import NoNorm
from fxfusion.models.surgery_proof import proof_tokens
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from tests.end_to_end.eager_parallel import llama

PLAN = FusionPlan(groups=[[1, 2]], hoist=True)
SITE = FfnSite("model.layers.1.mlp", ("model.layers.1.post_attention_layernorm",))


def recipe_of(model: Any) -> FuseRecipe:
    traced = TracedModel(model).graph(proof_tokens(model))
    return FuseRecipe.read(model, traced, PLAN)[0]


def moved(recipe: FuseRecipe) -> dict[str, tuple[str, ...]]:
    member = recipe.groups[0].members[1]
    return {SITE.ffn: (*member.large, *member.small)}


def test_the_ffn_and_the_norm_that_serves_only_it() -> None:
    model = llama()
    recipe = recipe_of(model)
    assert recipe.emptied == {1: SITE} and recipe.removed == () and recipe.kept == (0, 1, 2, 3)
    assert recipe.groups[0].layers == (2, 1) and recipe.groups[0].planned == PLAN.groups[0]
    assert recipe.fused_name("model.layers.1.mlp.up_proj.weight") is None
    assert recipe.fused_name("model.layers.1.self_attn.q_proj.weight") == "model.layers.1.self_attn.q_proj.weight"
    traced = TracedModel(model).graph(proof_tokens(model))
    members = recipe.groups[0].members
    assert [site.ffn for site in find_ffn_sites(traced, recipe.path, members)] == [
        "model.layers.2.mlp",
        "model.layers.1.mlp",
    ]


def test_stubs_add_nothing_and_are_taken_back() -> None:
    model = llama()
    recipe, ids, text = recipe_of(model), proof_tokens(model), str(model)
    with torch.no_grad():
        before = model(ids).logits
        layer = model.model.layers[1]
        down, weight = layer.mlp.down_proj, layer.mlp.down_proj.weight.clone()
        down.weight.zero_()
        without = model(ids).logits
        down.weight.copy_(weight)
    stubs = FfnStubs.of(model, recipe.emptied.values(), ids)
    stubs.put([SITE], moved(recipe), lambda: model(ids))
    assert type(layer.mlp) is NoFfn and type(layer.post_attention_layernorm) is NoNorm
    assert not list(layer.mlp.parameters()) and not layer.mlp.training and sorted(stubs.gone) == sorted(SITE.paths)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, without) and not torch.equal(without, before)
    stubs.give_back()
    assert str(model) == text and not stubs.gone
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_what_is_not_the_ffns_own_is_not_lost() -> None:
    model = llama()
    recipe, ids = recipe_of(model), proof_tokens(model)
    model.model.layers[1].mlp.extra = nn.Parameter(torch.zeros(2))
    stubs = FfnStubs.of(model, recipe.emptied.values(), ids)
    with pytest.raises(SurgeryError, match="model.layers.1.mlp.extra is no part of the FFN that moves"):
        stubs.put([SITE], moved(recipe), lambda: None)


def test_where_nothing_can_stand_in_the_model_is_as_it_was() -> None:
    model = llama()
    recipe, ids, text = recipe_of(model), proof_tokens(model), str(model)
    stubs = FfnStubs.of(model, recipe.emptied.values(), ids)

    def prove() -> None:
        raise SurgeryError("off")

    with pytest.raises(SurgeryError, match="nothing can stand in for model.layers.1.mlp; tried 0: SurgeryError: off"):
        stubs.put([SITE], moved(recipe), prove)
    assert str(model) == text and not stubs.gone
