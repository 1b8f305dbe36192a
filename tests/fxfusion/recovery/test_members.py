"""What a refit changed, by the names of the model as it was loaded; and folders of refitted models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.recovery.members import refitted_parameters
from tests.end_to_end.caching import off, recomputed, token_ids
from tests.fxfusion.recovery.own_text import PLAN, model_of, own_text

NAMES = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)]


def refitted(family: str = "llama", **more: object) -> nn.Module:
    found: nn.Module = fxfusion.refit(
        model_of(family), PLAN, own_text(family), "intact", later="ffn", penalties=(0.01,), **more
    )
    return found


@pytest.mark.slow
def test_members_and_later_layers_take_what_makes_the_same_model() -> None:
    found = refitted()
    intact = model_of()
    changed = dict(refitted_parameters(found))
    assert sorted(changed) == NAMES
    with torch.no_grad():
        for name, value in changed.items():
            intact.get_parameter(name).copy_(value)
    wanted, ids = recomputed(found, token_ids()), token_ids()
    assert off(recomputed(fxfusion.fuse(intact, PLAN), ids), wanted) < 1e-5
    assert off(recomputed(fxfusion.fuse(model_of(), PLAN), ids), wanted) > 1e-3, "the refit was not noticed"


@pytest.mark.parametrize("form", ["canonical", "nemotron-nas"])
@pytest.mark.slow
def test_folders_give_the_refitted_model_back(form: str, tmp_path: Path) -> None:
    found = refitted()
    fxfusion.save_pretrained(found, tmp_path / "out", form)  # type: ignore[arg-type]
    loaded = fxfusion.from_pretrained(tmp_path / "out")
    assert off(recomputed(loaded, token_ids()), recomputed(found, token_ids())) < 1e-5
    assert "refitted in closed form" in (tmp_path / "out" / "README.md").read_text()
    if form == "canonical":
        assert plan_of(loaded).refit == plan_of(found).refit is not None
        with pytest.warns(UserWarning, match="refitted for its fused form"):
            fxfusion.from_pretrained(tmp_path / "out", fused=False)


def test_biases_and_transposed_weights_are_refitted_and_saved(tmp_path: Path) -> None:
    found = refitted("gpt2")
    names = [name for name, _ in refitted_parameters(found)]
    assert {f"transformer.h.{layer}.mlp.c_proj.{kind}" for layer in (1, 2) for kind in ("weight", "bias")} <= {*names}
    fxfusion.save_pretrained(found, tmp_path / "out")
    loaded = fxfusion.from_pretrained(tmp_path / "out")
    assert off(recomputed(loaded, token_ids()), recomputed(found, token_ids())) < 1e-5


def test_a_model_that_was_not_refitted_has_none() -> None:
    with pytest.raises(SurgeryError, match="not refitted"):
        list(refitted_parameters(model_of()))
