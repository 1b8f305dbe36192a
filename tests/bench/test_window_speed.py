"""The benchmark of windows: its cases, the form that it checks against, and its part of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import performance_forms, performance_page, window_speed
from bench.record import Measurement, Record
from bench.whole_models import Case
from bench.window_speed import MODELS, WindowCase, cases, columns, measure_windows, rearranged, windows_of
from fxfusion import FusionPlan

SMALL = WindowCase(Case("small", "decode", 8, torch.float32), (2,))


def small() -> Any:
    torch.manual_seed(0)
    return MODELS["small"].intact(torch.float32, "cpu")


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
    assert MODELS[found[0].case.model].layers == 8


def test_windows_cover_all_layers() -> None:
    model = small()
    assert windows_of(model, 2) == [[0, 1], [2, 3], [4, 5]] and windows_of(model, 4) == [[0, 1, 2, 3], [4, 5]]


@torch.no_grad()
def test_the_rearranged_model_is_another_function_and_the_old_one_afterwards() -> None:
    """Equal to `fuse` on the same windows, which was written without it."""
    import copy

    import fxfusion

    model, ids = small(), torch.arange(9)[None]
    before = model(input_ids=ids).logits
    with rearranged(model, windows_of(model, 2), wide=False):
        hoisted = model(input_ids=ids).logits
    with rearranged(model, windows_of(model, 2), wide=True):
        wide = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, before)
    fused = fxfusion.fuse(copy.deepcopy(model), FusionPlan(groups=windows_of(model, 2), hoist=True), check=False)
    scale = before.abs().max()
    assert (fused(input_ids=ids).logits - hoisted).abs().max() < 1e-4 * scale
    assert (hoisted - before).abs().max() > 1e-2 * scale and (wide - hoisted).abs().max() > 1e-2 * scale


def test_a_form_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_is(run: Any, mode: str, model: Any, name: str) -> Any:
        return run

    monkeypatch.setattr(window_speed, "_compiled", as_it_is)
    monkeypatch.setattr(window_speed, "compiled", lambda run, mode: run)
    with pytest.raises(RuntimeError, match="the logits of hoist 2 are off by"):
        measure_windows(SMALL, small(), (), rounds=1, threads=1)


@pytest.mark.slow  # four forms are compiled
@pytest.mark.compile
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_small_case(phase: str) -> None:
    of = WindowCase(Case("small", phase, 8, torch.float32), (2,))
    found = measure_windows(of, small(), (), rounds=2, threads=1, sample_seconds=0.001)
    assert found.place["windows"] == "2" and set(found.samples) == {"intact", "hoist 2", "wide 2", "intact again"}


def made_up() -> Measurement:
    times = {"intact": [3.0, 3.0], "hoist 2": [2.0, 2.0], "wide 2": [1.5, 1.5], "intact again": [3.0, 3.0]}
    return Measurement.of(SMALL.place, times, SMALL.ratios)


def test_headings_name_the_candidates() -> None:
    assert [head for _, head in columns([made_up()])] == ["hoist 2", "wide 2", "A/A"]


def test_the_page_shows_it_when_the_file_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record.of("window_speed", measurements=(made_up(),))
    record.write(tmp_path / "window_speed.json")
    monkeypatch.setattr(performance_page, "RESULTS", tmp_path)
    waiting = performance_page.if_recorded("grouped_speed", performance_forms.grouped, "Norms")
    assert waiting == "## Norms\n\nNot recorded yet: `python -m bench.grouped_speed`."
    monkeypatch.setattr(Record, "read", staticmethod(lambda name: record))
    text = performance_page.if_recorded("window_speed", performance_forms.windows, "Windows")
    assert "* intact / hoist 2: 1.50x over 1 cases, faster in 1, slower in 0, and neither in 0" in text
    assert "2.00x [2.00, 2.00]" in text and "A/A" in text


def test_the_page_shows_groups_with_norms_on_their_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"unfused": [3.0], "members": [2.5], "fused": [2.0], "unfused_again": [3.0]}
    pairs = [("unfused", "fused"), ("members", "fused"), ("unfused", "unfused_again")]
    record = Record.of("grouped_speed", measurements=(Measurement.of({"tokens": 1}, times, pairs),))
    monkeypatch.setattr(Record, "read", staticmethod(lambda name: record))
    text = " ".join(performance_forms.grouped().split())
    assert "Over 1 cells of a chain of 8 the fused one is 1.50x as fast" in text and "1.25x" in text
