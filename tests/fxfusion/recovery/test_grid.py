"""A refit on the grid of a quantisation: all of it is there, better than rounding, and nothing else comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import OptionError
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.models.weight_grid import WeightGrid
from fxfusion.plan.record import LayerFit
from tests.fxfusion.recovery.own_text import PLAN, is_same, model_of, own_text, state

GRID = "int4:16"
WIDE = {"groups": [{"members": [1, 2], "mixers": "wide"}]}
HOISTED = {"groups": [{"members": [1, 2], "mixers": "hoist"}]}


def refitted(model: Any = None, plan: Any = PLAN, grid: str | None = GRID, **more: Any) -> Any:
    return fxfusion.refit(model or model_of(), plan, own_text(), grid=grid, **more)


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: one for name, one in model.model.layers.named_modules() if isinstance(one, nn.Linear)}


@torch.no_grad()
def rounded(model: Any, grid: str = GRID) -> Any:
    for one in linears(model).values():
        one.weight.copy_(WeightGrid.parse(grid).nearest(one.weight))
    return model


def loss(model: nn.Module) -> float:
    return float(fxfusion.evaluate(model, own_text(seed=7), resamples=100).loss)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLAN, WIDE, HOISTED], ids=["dropped", "wide", "hoisted"])
def test_every_layer_is_on_the_grid_and_better_than_rounded(plan: Any) -> None:
    model = model_of()
    before = state(model)
    found = refitted(model, plan)
    assert is_same(model, before)
    ready = state(found)
    assert is_same(rounded(found), ready), "an export would change it"
    other = refitted(plan=plan, grid=None)
    assert not is_same(rounded(other), state(refitted(plan=plan, grid=None)))
    assert loss(found) < loss(other)
    record = plan_of(found).refit
    assert record is not None and record.grid == GRID and f"grid: {GRID}" in str(record)
    left = {f"model.layers.{name}" for name in linears(found)} - {fit.name for fit in record.fits}
    assert left == ({"model.layers.2.self_attn.o_proj"} if plan == HOISTED else set()), "the stream there is no model's"
    raw = rounded(fxfusion.fuse(model_of(), plan))
    decides = own_text()[-1:]
    assert record.loss_before == pytest.approx(float(fxfusion.evaluate(raw, decides, resamples=100).loss), rel=1e-5)
    assert record.loss_after < record.loss_before


@pytest.mark.slow
def test_parts_are_whole_groups() -> None:
    parts: list[int] = []
    found = refitted(sides="out", memory_limit=300_000, on_layer=lambda layer, fit: parts.append(fit.parts))
    assert max(parts) > 1
    ready = state(found)
    assert is_same(rounded(found), ready)


@pytest.mark.slow
def test_without_a_penalty_a_layer_may_be_rounded_all_the_same() -> None:
    """Penalties so large that a fit moves nothing: what is left is the rounding, with feedback."""
    fits: list[Any] = []
    refitted(penalties=(1e9,), later="none", on_layer=lambda layer, fit: fits.append(fit))
    assert any(fit.applied and fit.penalty is None for fit in fits)
    shown = LayerFit(name="down", layers=(1,), penalty=None, before=0.2, after=0.1, applied=True)
    assert str(shown).endswith("error 0.2 -> 0.1, rounded")


@pytest.mark.slow
def test_a_refit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, seen = state(refitted()), []

    def stop(layer: Any, fit: Any) -> None:
        seen.append(layer.name)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refitted(cache=tmp_path, on_layer=stop)
    assert is_same(refitted(cache=tmp_path), whole)
    with pytest.raises(OptionError, match="grid is"):
        refitted(cache=tmp_path, grid="int8:16")


@pytest.mark.parametrize(
    ("grid", "message"),
    [("int5:16", "grid: expected int4:GROUP or int8:GROUP"), ("int4:24", "has 32 inputs, which are no whole groups")],
)
def test_bad_grids(grid: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        refitted(grid=grid)
