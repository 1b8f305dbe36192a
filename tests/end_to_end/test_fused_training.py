"""A fused model trains like any other, and its members can be had back afterwards.

The reference is the model with stubs put in by hand, run in its parallel form (`families.in_parallel`): nothing of
fxfusion. Gradients of wide parameters are carried to the members' by a fold that is written down here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.errors import SurgeryError
from tests.end_to_end import caching
from tests.end_to_end.caching import RED, off
from tests.end_to_end.families import in_parallel, parallel_form
from tests.end_to_end.family_table import family_named

pytestmark = pytest.mark.slow

MEMBERS = [1, 2, 3]
GRADIENTS, LOGITS = 2e-5, 1e-5
IDS = caching.token_ids()


def plan(norm: Any = "fold") -> fxfusion.FusionPlan:
    return fxfusion.FusionPlan(dropped_attention=MEMBERS, groups=[MEMBERS], norm=norm)


def fused(family: str, norm: Any = "fold") -> Any:
    """A random float32 model, fused. Layer 0 is as it was, layer 1 is as wide as layers 1, 2 and 3."""
    return fxfusion.fuse(caching.decoder(family_named(family), use_cache=False), plan(norm))


def stubbed(family: str) -> Any:
    """The same model, not fused: attention taken out of layers 1, 2 and 3 by hand."""
    one = family_named(family)
    return caching.stubbed(caching.decoder(one, use_cache=False), one, MEMBERS)


def loss_of(model: Any, ids: Tensor = IDS) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def train(model: Any, steps: int, rate: float = 1e-2) -> list[float]:
    """Losses of so many steps of AdamW on one batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    missing = [name for name, value in model.named_parameters() if name not in found and value.requires_grad]
    assert not missing, f"no gradient reached {missing}"
    return found


# --- gradients ----------------------------------------------------------------------------------------


def gated(layer: str, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wide weights of a gated FFN without biases, from its members' parameters: rows times gains, columns."""
    norm, mlp = "post_attention_layernorm.weight", "mlp"
    members = [f"{layer}.{number}" for number in MEMBERS]
    rows = {
        f"{layer}.1.{mlp}.{name}.weight": torch.cat(
            [of[f"{at}.{mlp}.{name}.weight"] * of[f"{at}.{norm}"] for at in members]
        )
        for name in ("gate_proj", "up_proj")
    }
    down = torch.cat([of[f"{at}.{mlp}.down_proj.weight"] for at in members], dim=1)
    return {**rows, f"{layer}.1.{mlp}.down_proj.weight": down}


def conv1d(layer: str, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for fc1-activation-fc2 with LayerNorm and biases; weights are stored `[in, out]`."""
    members = [f"{layer}.{number}" for number in MEMBERS]
    first = torch.cat([of[f"{at}.ln_2.weight"][:, None] * of[f"{at}.mlp.c_fc.weight"] for at in members], dim=1)
    shifts = [of[f"{at}.mlp.c_fc.bias"] + of[f"{at}.ln_2.bias"] @ of[f"{at}.mlp.c_fc.weight"] for at in members]
    return {
        f"{layer}.1.mlp.c_fc.weight": first,
        f"{layer}.1.mlp.c_fc.bias": torch.cat(shifts),
        f"{layer}.1.mlp.c_proj.weight": torch.cat([of[f"{at}.mlp.c_proj.weight"] for at in members]),
        f"{layer}.1.mlp.c_proj.bias": sum(of[f"{at}.mlp.c_proj.bias"] for at in members),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize(("name", "fold"), [("llama", gated), ("gpt2", conv1d)])
def test_gradients_are_those_of_the_parallel_form(name: str, fold: Any) -> None:
    family = family_named(name)
    model, reference = fused(name), stubbed(name)
    loss_of(model).backward()
    with in_parallel(reference, family):
        loss_of(reference).backward()
    found, wanted = gradients(model), gradients(reference)

    own = {name: value.detach().requires_grad_() for name, value in reference.named_parameters()}
    wide = fold(family.layers, own)
    parts = [name for name in wanted if any(name.startswith(f"{family.layers}.{number}.") for number in MEMBERS)]
    carried = torch.autograd.grad(list(wide.values()), [own[part] for part in parts], [found[name] for name in wide])
    for part, gradient in zip(parts, carried, strict=True):
        assert off(gradient, wanted[part]) <= GRADIENTS, part
    elsewhere = [name for name in wanted if name not in parts]
    assert elsewhere and max(off(found[name], wanted[name]) for name in elsewhere) <= GRADIENTS

    reference.zero_grad()
    loss_of(reference).backward()  # one layer after the other: another function
    sequential = gradients(reference)
    assert max(off(found[name], sequential[name]) for name in elsewhere) > RED


# --- fine-tuning --------------------------------------------------------------------------------------


def test_fine_tuning_with_gradient_checkpointing_and_autocast() -> None:
    model = fused("llama")
    model.train()
    plain = copy.deepcopy(model)
    loss_of(plain).backward()

    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    loss_of(model).backward()
    found, wanted = gradients(model), gradients(plain)
    assert max(off(found[name], wanted[name]) for name in wanted) <= 1e-6
    wide = [name for name, value in model.named_parameters() if 3 * 48 in value.shape]
    assert len(wide) == 3 and all(bool(found[name].any()) for name in wide)

    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train(model, steps=12)
    assert losses[-1] < 0.7 * losses[0]
    assert all(off(value.detach(), before[name]) > 1e-3 for name, value in model.named_parameters())
    assert all(value.dtype == torch.float32 for value in model.parameters())


# --- members after training ---------------------------------------------------------------------------

TRAINED = [
    *(("llama", "fold"), ("llama", "last")),  # separate gate and up
    *(("gpt2", "fold"), ("gpt2", "last")),  # Conv1D, LayerNorm, biases
    ("gemma", "fold"),  # the gain is 1 + weight
    ("phi3", "fold"),  # packed gate and up
    ("smollm3", "fold"),  # biases on gate, up and down
    ("granite", "fold"),  # a multiplier after the FFN
    ("starcoder2", "last"),
]


@pytest.mark.parametrize(("name", "norm"), TRAINED, ids=lambda value: value)
def test_members_given_back_after_training_are_the_trained_model_in_parallel(name: str, norm: Any) -> None:
    family, inputs = family_named(name), {"input_ids": IDS}
    model = fused(name, norm)
    untrained = caching.recomputed(model, IDS)
    losses = train(model.train(), steps=4)
    assert losses[-1] < losses[0]
    trained = caching.recomputed(model.eval(), IDS)
    assert off(untrained, trained) > RED

    fxfusion.unfuse(model)
    assert model.config.num_hidden_layers == 4
    again = parallel_form(model, family, inputs, last_norm=norm == "last")
    assert off(again, trained) <= LOGITS
    assert {n: v.shape for n, v in model.state_dict().items()} == {
        n: v.shape for n, v in stubbed(name).state_dict().items()
    }
    train(model.train(), steps=1)  # members train, too


def test_a_trained_bias_that_no_member_has_is_refused_and_the_model_stays_fused() -> None:
    model = fused("stablelm")  # LayerNorm has a shift, the projections have no bias
    train(model, steps=1)
    trained = caching.recomputed(model, IDS)
    with pytest.raises(SurgeryError, match="was trained since it was fused, and .* has no such bias"):
        fxfusion.unfuse(model)
    assert torch.equal(caching.recomputed(model, IDS), trained)
