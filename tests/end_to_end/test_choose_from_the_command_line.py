"""From a trained model to the page of results by commands alone, as users run them: each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.reference import MODEL_FOLDER
from bench.whole_path import GOAL_SECONDS, whole_path
from fxfusion.plan.fusion_plan import FusionPlan

pytestmark = [pytest.mark.slow, pytest.mark.compile]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def found(results: Path) -> dict[str, Any]:
    return whole_path(results, "--sequences", "16")


def test_the_whole_path_is_walked_in_minutes(found: dict[str, Any]) -> None:
    """On half the text of `bench.whole_path`, and in processor time: other tests may run beside this one."""
    assert found["total_processor_seconds"] < GOAL_SECONDS


def test_the_plan_fuses_and_costs_what_the_compiled_model_shows(found: dict[str, Any], results: Path) -> None:
    plan = FusionPlan.load(results / "plan.yaml")
    assert len(plan.dropped_attention) == 5 and plan.groups and plan.model is not None and plan.scores is not None
    loss = {name: one["loss"]["value"] for name, one in found["quality"].items()}
    intact, dropped, fused = loss.values()
    assert intact < dropped < dropped + 0.5 and abs(fused - dropped) < 0.1
    assert fused != dropped
    control = found["quality"]["intact model"]
    assert control["kl"]["value"] == 0 and control["top1"]["value"] == 1


def test_the_page_shows_what_was_measured(found: dict[str, Any], results: Path) -> None:
    page = (results / "report.html").read_text("utf-8")
    perplexities = [f"{one['perplexity']['value']:.2f}" for one in found["quality"].values()]
    assert all(value in page for value in perplexities)
    for heading in ("Layers", "Dependency between layers", "Plan", "Quality", "Generated text"):
        assert f">{heading}<" in page
    assert found["page_bytes"] <= 2_000_000


def test_the_results_are_about_the_reference_model(found: dict[str, Any], results: Path) -> None:
    model = json.loads((results / "model.json").read_text())
    config = json.loads((MODEL_FOLDER / "config.json").read_text())
    assert model["facts"]["layers"] == len(model["layers"]) == config["num_hidden_layers"]
    assert {layer["width"] for layer in model["layers"]} == {config["intermediate_size"]}
    assert all(layer["has_mixer"] for layer in model["layers"])
