"""refit of both sides: what reads the stream first, against a solution made by hand; and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.errors import OptionError
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.plan.record import LayerFit
from fxfusion.recovery.refit import refitted_parameters
from tests.end_to_end.caching import off, recomputed, token_ids
from tests.fxfusion.recovery.own_text import PLAN, is_same, model_of, own_text, state

SHARE = 0.01
HOIST = {"groups": [{"members": [1, 2], "mixers": "hoist"}]}
WIDE = {"groups": [{"members": [1, 2], "mixers": "wide"}]}


def refitted(family: str = "llama", plan: Any = PLAN, **more: Any) -> Any:
    return fxfusion.refit(model_of(family), plan, own_text(family), **{"penalties": (SHARE,), **more})


def fits_of(model: nn.Module, side: str = "in") -> list[LayerFit]:
    record = plan_of(model).refit
    assert record is not None and record.sides == "both"
    return [fit for fit in record.fits if fit.side == side]


def loss(model: nn.Module, family: str = "llama") -> float:
    return float(fxfusion.evaluate(model, own_text(family, seed=7), resamples=100).loss)


def inputs_of(module: nn.Module, model: nn.Module, ids: Tensor) -> Tensor:
    found = []
    hook = module.register_forward_pre_hook(lambda own, given: found.append(given[0]))
    model(ids)
    hook.remove()
    return found[0].reshape(-1, found[0].shape[-1]).double()


@torch.no_grad()
def by_hand(intact: Any, fused: Any, member: int, share: float) -> Tensor:
    """A member's rows of the gate: argmin |n W_i^T - s W^T|^2 + penalty |W - W0|^2, by stacked least squares."""
    ids = [batch for number, batch in enumerate(own_text()) if number != 5]  # of six batches the last one decides
    own = intact.model.layers[member].mlp.gate_proj
    wide = fused.model.layers[1].mlp.gate_proj
    now = torch.cat([inputs_of(wide, fused, batch) for batch in ids])
    wanted = torch.cat([inputs_of(own, intact, batch) for batch in ids]) @ own.weight.double().t()
    rows = slice((member - 1) * own.out_features, member * own.out_features)
    ones = torch.cat([now, now.new_ones(len(now), 1)], dim=1)
    penalty = share * ones[:, :-1].square().sum(0).mean()
    root = penalty.sqrt() * torch.eye(now.shape[1]).double()
    before = wide.weight[rows].double()
    return torch.linalg.lstsq(torch.cat([now, root]), torch.cat([wanted, penalty.sqrt() * before.t()])).solution.t()


@pytest.mark.parametrize("member", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_solution_is_that_of_the_formula(member: int) -> None:
    intact, fused = model_of(), fxfusion.fuse(model_of(), PLAN)
    found = refitted(later="none").model.layers[1].mlp.gate_proj.weight.double()
    width = found.shape[0] // 2
    rows = found[(member - 1) * width : member * width]
    wanted = by_hand(intact, fused, member, SHARE)
    assert (rows - wanted).norm() <= 1e-4 * wanted.norm()
    assert (rows - by_hand(intact, fused, member, 3 * SHARE)).norm() > 1e-3 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLAN, HOIST, WIDE, {"removed": [1]}], ids=["drop", "hoist", "wide", "remove"])
def test_both_sides_are_better_than_one(plan: Any) -> None:
    one, both = refitted(plan=plan, sides="out"), refitted(plan=plan)
    assert loss(both) < loss(one) < loss(fxfusion.fuse(model_of(), plan))
    assert any(fit.applied for fit in fits_of(both)) and all(fit.after <= fit.before for fit in fits_of(both))


@pytest.mark.slow
def test_what_is_refitted_in_a_hoisted_window() -> None:
    """The inputs of attention that goes before the first FFN too, though the reference has no stream after it."""
    fits = fits_of(refitted(plan=HOIST))
    names = [(fit.name.removeprefix("model.layers."), fit.layers) for fit in fits]
    heads = ("q_proj", "k_proj", "v_proj")
    assert names == [
        *((f"1.self_attn.{name}", (1,)) for name in heads),
        *((f"2.self_attn.{name}", (2,)) for name in heads),
        *((f"2.mlp.{name}", (1, 2)) for name in ("gate_proj", "up_proj")),
        *((f"3.self_attn.{name}", (3,)) for name in heads),
        *((f"3.mlp.{name}", (3,)) for name in ("gate_proj", "up_proj")),
    ]
    assert not any(fit.applied for fit in fits[:3]), "nothing before the window is off"
    assert all(fit.applied for fit in fits[3:8])


@pytest.mark.slow
@pytest.mark.parametrize("later", ["none", "ffn"])
def test_later_layers_are_left_alone_where_they_should(later: str) -> None:
    fits = fits_of(refitted(plan=WIDE, later=later))
    names = {fit.name.removeprefix("model.layers.") for fit in fits}
    block = {f"1.self_attn.{name}_proj" for name in "qkv"} | {"1.mlp.gate_proj", "1.mlp.up_proj"}
    assert names == block | ({"2.mlp.gate_proj", "2.mlp.up_proj"} if later == "ffn" else set())


# Biases, LayerNorm and Conv1D; parallel blocks with packed q, k, v; packed gate and up; norms of q and k.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "opt", "qwen3"])
def test_other_families(family: str) -> None:
    found = refitted(family)
    assert loss(found, family) < loss(fxfusion.fuse(model_of(family), PLAN), family)
    assert any(fit.applied for fit in fits_of(found))
    assert same_model(found, family, PLAN)
    plain = recomputed(fxfusion.fuse(model_of(family), PLAN), token_ids())
    assert off(plain, recomputed(found, token_ids())) > 1e-3, "nothing was refitted"


def same_model(found: Any, family: str, plan: Any) -> bool:
    """Whether the model as it was loaded, with what was refitted, fuses to the one that was found."""
    intact = model_of(family)
    with torch.no_grad():
        for name, value in refitted_parameters(found):
            intact.get_parameter(name).copy_(value)
    return off(recomputed(fxfusion.fuse(intact, plan), token_ids()), recomputed(found, token_ids())) < 1e-4


@pytest.mark.slow
def test_norms_with_shifts_and_layers_without_biases() -> None:
    """The wide layer's bias belongs to the shifts: the group's first layers stay, those of later layers need not."""
    reasons: list[str] = []
    found = refitted("stablelm", on_layer=lambda layer, fit: reasons.append(fit.why))
    assert any("gate_proj.weight has no bias, and the shift of its norm became one" in why for why in reasons)
    assert not any(fit.applied for fit in fits_of(found) if len(fit.layers) == 2 and "mlp" in fit.name)
    assert any(fit.applied for fit in fits_of(found))
    assert same_model(found, "stablelm", PLAN)


@pytest.mark.slow
def test_a_group_that_keeps_its_last_norm() -> None:
    plan = {**PLAN, "norm": "last"}
    found = refitted(plan=plan)
    assert any(fit.applied for fit in fits_of(found) if fit.layers == (1, 2))
    assert same_model(found, "llama", plan)


@pytest.mark.slow
def test_gains_of_zero_are_no_obstacle(tmp_path: Path) -> None:
    """A channel that a member's norm takes out can be of use for the estimate of what it should read."""
    model = model_of()
    with torch.no_grad():
        model.model.layers[2].post_attention_layernorm.weight[:3] = 0.0
    found = fxfusion.refit(model, PLAN, own_text(), penalties=(SHARE,))
    fxfusion.save_pretrained(found, tmp_path / "out", "canonical")
    loaded = fxfusion.from_pretrained(tmp_path / "out")
    assert off(recomputed(loaded, token_ids()), recomputed(found, token_ids())) < 1e-4


@pytest.mark.slow
def test_what_does_not_bring_the_stream_nearer_is_not_applied() -> None:
    one = own_text()[0][:1, :6]
    with pytest.warns(UserWarning, match="calibration tokens are few"):
        found = fxfusion.refit(model_of(), PLAN, [one], validation=own_text(seed=3)[:1], penalties=(1e-9,))
    assert is_same(found, state(fxfusion.fuse(model_of(), PLAN)))
    assert not any(fit.applied for fit in fits_of(found)) and fits_of(found)


def test_too_little_memory_is_said_before_anything_is_fitted() -> None:
    with pytest.raises(OptionError, match=r"gate_proj and .*up_proj take [\d,]+ bytes, .* \(or sides=\"out\"\)"):
        refitted(memory_limit=100_000, on_layer=lambda layer, fit: pytest.fail(layer.name))


@pytest.mark.slow
def test_a_refit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, seen = state(refitted()), []

    def stop(layer: Any, fit: Any) -> None:
        seen.append(layer.name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refitted(cache=tmp_path, on_layer=stop)
    rest: list[str] = []
    found = refitted(cache=tmp_path, on_layer=lambda layer, fit: rest.append(layer.name))
    assert seen[0] == "model.layers.1.mlp.gate_proj and model.layers.1.mlp.up_proj"
    assert rest and not set(rest) & set(seen) and is_same(found, whole)
