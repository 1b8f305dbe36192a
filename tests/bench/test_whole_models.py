"""The benchmark of windows: its cases, and the form that it checks against."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import whole_models
from bench.grid import Limits
from bench.record import Measurement
from bench.whole_models import SIZES, Case, WindowCase, cases, measure_windows, rearranged, window_columns, windows_of
from fxfusion import FusionPlan

SMALL = WindowCase(Case("small", "decode", 8, torch.float32), (2,))


def small() -> Any:
    torch.manual_seed(0)
    return SIZES["small"].intact(torch.float32, "cpu")


def test_what_is_measured() -> None:
    found = list(cases(small=False))
    assert [(of.case.phase, of.case.tokens, of.place["dtype"]) for of in found] == [
        ("decode", 64, "bfloat16"),
        ("decode", 64, "float32"),
        ("prefill", 128, "bfloat16"),
        ("prefill", 128, "float32"),
    ]
    assert found[0].ratios == [
        ("intact", "hoist 2"),
        ("intact", "wide 2"),
        ("intact", "hoist 4"),
        ("intact", "wide 4"),
        ("intact", "intact again"),
    ]
    assert SIZES[found[0].case.model].layers == 8


def test_windows_cover_all_layers() -> None:
    assert windows_of(6, 2) == [[0, 1], [2, 3], [4, 5]] and windows_of(6, 4) == [[0, 1, 2, 3], [4, 5]]


@torch.no_grad()
def test_the_rearranged_model_is_another_function_and_the_old_one_afterwards() -> None:
    """Equal to `fuse` on the same windows, which was written without it."""
    import copy

    import fxfusion

    model, ids = small(), torch.arange(9)[None]
    before = model(input_ids=ids).logits
    with rearranged(model, windows_of(6, 2), wide=False):
        hoisted = model(input_ids=ids).logits
    with rearranged(model, windows_of(6, 2), wide=True):
        wide = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, before)
    fused = fxfusion.fuse(copy.deepcopy(model), FusionPlan(groups=windows_of(6, 2), hoist=True), check=False)
    scale = before.abs().max()
    assert (fused(input_ids=ids).logits - hoisted).abs().max() < 1e-4 * scale
    assert (hoisted - before).abs().max() > 1e-2 * scale and (wide - hoisted).abs().max() > 1e-2 * scale


def test_a_form_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_is(run: Any, mode: str, size: Any, name: str) -> Any:
        return run

    monkeypatch.setattr(whole_models, "_compiled", as_it_is)
    with pytest.raises(RuntimeError, match="the logits of hoist 2 is off by"):
        measure_windows(SMALL, small(), (), rounds=1, threads=1)


@pytest.mark.slow  # four forms are compiled
@pytest.mark.compile
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_small_case(phase: str) -> None:
    of = WindowCase(Case("small", phase, 8, torch.float32), (2,), dropped=True)
    limits = Limits(bandwidth=1e10, rate={torch.float32: 1e12})
    found = measure_windows(
        of, small(), ("default", "max-autotune"), limits=limits, rounds=2, threads=1, sample_seconds=0.001
    )
    forms = {"intact", "hoist 2", "wide 2", "dropped", "intact again", "intact, max-autotune"}
    assert found.place["windows"] == "2" and set(found.samples) == forms
    assert {"intact/dropped", "intact, max-autotune/wide 2"} < set(found.ratios)
    shares = {
        name: found.facts[f"share of limit, {name}"] * found.medians[name].value for name in ("intact", "dropped")
    }
    assert 0 < shares["dropped"] < shares["intact"]  # it reads less


def made_up() -> Measurement:
    times = {"intact": [3.0, 3.0], "hoist 2": [2.0, 2.0], "wide 2": [1.5, 1.5], "intact again": [3.0, 3.0]}
    return Measurement.of(SMALL.place, times, SMALL.ratios)


def test_headings_name_the_candidates() -> None:
    assert [head for _, head in window_columns([made_up()])] == ["hoist 2", "wide 2", "A/A"]
