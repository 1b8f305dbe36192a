"""Families of transformers fused in their own modules: equal to the parallel form, and given back by `unfuse`.

The reference is the user's own modules run in parallel under hooks, before anything is fused.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion import ffn_fusion
from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.unfuse import unfused_tensors
from fxfusion.plan.fusion_plan import FusionPlan
from tests.end_to_end.families import Family, layers_of, make_inputs, make_model, parallel_form, relative, run
from tests.end_to_end.family_table import FAST, VARIANTS
from tests.end_to_end.slow_families import SLOW

pytestmark = pytest.mark.usefixtures("clean_dynamo")

RED = 1e-4
ROUNDING = 1e-6  # of families that compute in float32 inside
QUICK = ("llama", "gemma", "phi3", "granite", "gpt2", "gpt_neox", "cohere", "falcon")
"""Pre-norm, one plus weight, packed gate/up, scaled branches, Conv1D, biases, parallel blocks, a bias on its own."""

LOOPED = {"hrm_text"}  # runs its layers several times, outside of any layer of its own


def cases() -> list[Any]:
    causal = {family.id: family for family in (*FAST, *VARIANTS, *SLOW) if family.kind == "causal"}
    causal = {name: family for name, family in causal.items() if family.fused == 3 and name not in LOOPED}
    quick = [pytest.param(causal[name], id=name) for name in QUICK]
    others = [pytest.param(family, id=name, marks=pytest.mark.slow) for name, family in causal.items()]
    return quick + [case for case in others if case.id not in QUICK]


def plan_for(model: nn.Module, family: Family, norm: str) -> FusionPlan:
    """All layers but the first in one group."""
    return FusionPlan(groups=[list(range(1, len(layers_of(model, family))))], norm=norm)


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("family", cases())
def test_fused_modules_equal_the_parallel_form_and_come_apart_again(family: Family, norm: str) -> None:
    model = make_model(family)
    inputs = make_inputs(family, model)
    if norm == "last" and not family.ffn_norm:
        pytest.fail("give the family's FFN norm")
    sequential, parallel = run(model, inputs), parallel_form(model, family, inputs, last_norm=norm == "last")
    assert relative(parallel, sequential) > 0.01
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config, kinds = model.config.to_dict(), [type(part) for part in layers_of(model, family)[1].modules()]

    fxfusion.fuse(model, plan_for(model, family, norm))

    limit = max(family.limit, 1e-10)
    fused = run(model, inputs)
    assert relative(fused, parallel) <= limit
    assert relative(fused, sequential) > RED, "the comparison could not fail"
    assert len(layers_of(model, family)) == 2
    assert [type(part) for part in layers_of(model, family)[1].modules()] == kinds, "stock modules only got wider"
    assert check_tensors(model, weights, exact=norm == "last")

    fxfusion.unfuse(model)
    assert relative(run(model, inputs), sequential) <= (ROUNDING if family.dtype == torch.float32 else 1e-12)
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(weights)
    if norm == "last":
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def check_tensors(model: nn.Module, weights: dict[str, torch.Tensor], exact: bool) -> bool:
    """The members of a fused model under their own names, without taking it apart."""
    found = dict(unfused_tensors(model))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value) if exact else torch.allclose(found[name], value, rtol=1e-5, atol=1e-6)
    return True


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_backend_gives_the_same_numbers(name: str) -> None:
    family = next(family for family in FAST if family.id == name)
    model = make_model(family).to(torch.float32)
    inputs, plan = make_inputs(family, model), plan_for(model, family, "fold")
    options = {"plan": plan, "compiler": "eager", "strict": True}
    by_graph = run(torch.compile(copy.deepcopy(model), backend=ffn_fusion, options=options), inputs)
    by_modules = run(fxfusion.fuse(model, plan), inputs)
    assert relative(by_modules, by_graph) <= 1e-5
    with torch.no_grad():
        next(value for value in layers_of(model, family)[1].parameters() if value.dim() == 2)[:1].mul_(2.0)
    assert relative(run(model, inputs), by_graph) > RED, "one row that is wrong was not noticed"


def test_a_model_that_runs_its_layers_several_times_is_refused() -> None:
    family = next(family for family in SLOW if family.id == "hrm_text")
    model = make_model(family)
    inputs = make_inputs(family, model)
    before = run(model, inputs)
    with pytest.raises(SurgeryError, match="belongs to no numbered layer"):
        fxfusion.fuse(model, {"groups": [[1, 2, 3]]})
    assert torch.equal(run(model, inputs), before)
