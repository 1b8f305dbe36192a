"""refit in other families, dtypes and with padding: the stream after the group comes nearer, seen by hooks alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.models.drop_record import read_refit
from tests.end_to_end.families import layers_of
from tests.end_to_end.family_table import family_named
from tests.fxfusion.recovery.own_text import LENGTH, PLAN, model_of, own_text

# Parallel blocks, a constant scale after the FFN, biases and Conv1D; packed gate and up, other biases.
FAMILIES = [
    *("gpt_neox", "granite", "gpt2"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "opt", "cohere")),
]


@torch.no_grad()
def stream(model: Any, family: str, layer: int, ids: Tensor, **inputs: Any) -> Tensor:
    """After a decoder layer, `[tokens, hidden]`."""
    found = []
    hook = layers_of(model, family_named(family))[layer].register_forward_hook(
        lambda module, given, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(ids, **inputs)
    hook.remove()
    return found[0].reshape(ids.numel(), -1).double()


def distance(model: nn.Module, intact: nn.Module, family: str, ids: Tensor) -> float:
    """Of the stream after the group (layer 1 of the fused model) from that after layer 2 of the intact one."""
    wanted = stream(intact, family, 2, ids)
    return float((stream(model, family, 1, ids) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_after_the_group_comes_nearer(family: str) -> None:
    intact, held_out = model_of(family), own_text(family)[5]  # of six batches the last one decides
    fused = fxfusion.fuse(copy.deepcopy(intact), PLAN)
    found = fxfusion.refit(intact, PLAN, own_text(family), "intact", later="none", sides="out", penalties=(0.003, 0.03))
    record = read_refit(found.config)
    assert record is not None and record.fits[0].applied
    assert record.fits[0].before == pytest.approx(distance(fused, intact, family, held_out), rel=1e-3)
    assert record.fits[0].after == pytest.approx(distance(found, intact, family, held_out), rel=1e-3)
    assert record.fits[0].after < 0.97 * record.fits[0].before


@pytest.mark.slow
def test_half_precision_weights_are_fitted_in_float32() -> None:
    model = model_of().to(torch.bfloat16)
    found = fxfusion.refit(model, PLAN, own_text(), "intact", later="none", sides="out", penalties=(0.01,))
    assert {value.dtype for value in found.parameters()} == {torch.bfloat16}
    exact = fxfusion.refit(model_of(), PLAN, own_text(), "intact", later="none", sides="out", penalties=(0.01,))
    one, other = (each.model.layers[1].mlp.down_proj.weight.float() for each in (found, exact))
    plain = fxfusion.fuse(model_of(), PLAN).model.layers[1].mlp.down_proj.weight
    assert (one - other).norm() < 0.05 * (other - plain).norm()


@pytest.mark.slow
def test_padding_is_not_fitted_to() -> None:
    padded = []
    for batch in own_text():
        ids = torch.cat([torch.zeros(16, 4, dtype=torch.long), batch], dim=1)
        mask = torch.cat([torch.zeros(16, 4, dtype=torch.long), torch.ones(16, LENGTH, dtype=torch.long)], dim=1)
        places = torch.arange(-4, LENGTH).clamp(min=0).expand(16, -1)
        padded.append({"input_ids": ids, "attention_mask": mask, "position_ids": places})
    more: dict[str, Any] = {"later": "none", "sides": "out", "penalties": (0.01,)}
    found = fxfusion.refit(model_of(), PLAN, padded, "intact", **more)
    wanted = fxfusion.refit(model_of(), PLAN, own_text(), "intact", **more)
    one, other = (each.model.layers[1].mlp.down_proj.weight for each in (found, wanted))
    plain = fxfusion.fuse(model_of(), PLAN).model.layers[1].mlp.down_proj.weight
    assert (one - other).norm() < 1e-3 * (other - plain).norm()
