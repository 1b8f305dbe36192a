"""unfuse: the members come back, also where a gain was zero or biases were summed."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.models.ffn_surgery.residue import residue_of
from fxfusion.models.ffn_surgery.unfuse import unfused_tensors
from tests.end_to_end.caching import decoded, decoder, new_cache, off, recomputed, token_ids
from tests.end_to_end.family_table import family_named

PLAN: dict[str, Any] = {"dropped_attention": [1, 2], "groups": [[0, 1, 2]]}


@lru_cache
def _dropped(name: str) -> Any:
    return fxfusion.drop_attention(decoder(family_named(name)), [1, 2])


def dropped(name: str) -> Any:
    """A random model of four layers without the attention of two; a copy of its own for each test."""
    return copy.deepcopy(_dropped(name))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(model: nn.Module, before: dict[str, torch.Tensor], exact: bool) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        same = torch.equal(after[name], value) if exact else torch.allclose(after[name], value, rtol=1e-5, atol=1e-6)
        assert same, name


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_everything_comes_back(name: str, norm: str) -> None:
    model = dropped(name)
    before, config, kinds = weights(model), model.config.to_dict(), [repr(part) for part in model.modules()]
    outside = recomputed(model, token_ids())
    fxfusion.fuse(model, {**PLAN, "norm": norm})
    assert fxfusion.unfuse(model) is model
    assert_close(model, before, exact=norm == "last")
    assert model.config.to_dict() == config and [repr(part) for part in model.modules()] == kinds
    assert off(recomputed(model, token_ids()), outside) <= 1e-5
    assert off(decoded(model, token_ids(), new_cache("dynamic", model)), outside) <= 1e-4
    assert fused_state(model) is None


def test_fusing_again_after_unfusing() -> None:
    model = dropped("llama")
    first = recomputed(fxfusion.fuse(model, PLAN), token_ids())
    again = recomputed(fxfusion.fuse(fxfusion.unfuse(model), PLAN), token_ids())
    assert off(again, first) <= 1e-5


def test_gains_that_are_zero_lose_no_weights() -> None:
    model = dropped("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3:7] = 0.0
    before = weights(model)
    fxfusion.fuse(model, PLAN)
    state = fused_state(model)
    assert state is not None
    kept = [name for name in state.residue if name.endswith(":columns")]
    assert sorted(kept) == [f"model.layers.1.mlp.{which}_proj.weight:columns" for which in ("gate", "up")]
    assert state.residue[kept[0]].shape == (48, 4)
    fxfusion.unfuse(model)
    assert_close(model, before, exact=False)
    assert torch.equal(model.model.layers[1].mlp.gate_proj.weight[:, 3:7], before[kept[0][: -len(":columns")]][:, 3:7])


def test_without_the_residue_such_columns_would_be_lost() -> None:
    model = dropped("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3:7] = 0.0
    fxfusion.fuse(model, PLAN)
    state = fused_state(model)
    assert state is not None
    for name in [name for name in state.residue if name.endswith(":columns")]:
        del state.residue[name]
    fxfusion.unfuse(model)
    assert not model.model.layers[1].mlp.gate_proj.weight[:, 3:7].any()


def test_the_residue_is_small_and_holds_every_bias() -> None:
    model = dropped("gpt2")
    fxfusion.fuse(model, PLAN)
    state = fused_state(model)
    assert state is not None
    size = sum(value.numel() for value in state.residue.values())
    assert size < 0.05 * sum(value.numel() for value in model.parameters())
    assert {f"transformer.h.{layer}.mlp.c_proj.bias" for layer in (0, 1, 2)} <= state.residue.keys()


def test_tensors_of_the_members_without_taking_the_model_apart() -> None:
    model = dropped("llama")
    before = weights(model)
    fxfusion.fuse(model, {**PLAN, "norm": "last"})
    found = dict(unfused_tensors(model))
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert len(model.model.layers) == 2


def test_a_model_that_is_not_fused_gives_its_own_tensors() -> None:
    model = dropped("llama")
    assert {name: id(value) for name, value in unfused_tensors(model)} == {
        name: id(value) for name, value in model.state_dict(keep_vars=True).items()
    }
    with pytest.raises(SurgeryError, match="is not fused"):
        fxfusion.unfuse(model)


def test_a_model_that_was_fused_elsewhere_says_so() -> None:
    model = fxfusion.fuse(dropped("llama"), PLAN)
    other = copy.deepcopy(model)
    del other._fxfusion_fused
    with pytest.raises(SurgeryError, match="fused in another process"):
        fxfusion.unfuse(other)


def test_a_fused_model_survives_pickling(tmp_path: Any) -> None:
    model = fxfusion.fuse(dropped("llama"), PLAN)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert off(recomputed(fxfusion.unfuse(loaded), token_ids()), recomputed(dropped("llama"), token_ids())) <= 1e-5


def test_what_a_group_leaves_behind_is_read_from_any_mapping() -> None:
    model = dropped("llama")
    before = weights(model)
    fxfusion.fuse(model, PLAN)
    state = fused_state(model)
    assert state is not None
    (group,) = state.recipe.groups
    assert residue_of(group, before).keys() == state.residue.keys()
