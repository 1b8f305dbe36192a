"""The demo as `make demo` runs it: the trained reference model, Inductor, the console's code path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.compile]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    html = tmp_path_factory.mktemp("demo") / "report.html"
    command = [sys.executable, "-m", "examples.demo", "--json", "--output", str(html)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_rewrite_is_exact_and_the_check_can_fail(result: dict[str, Any]) -> None:
    exact = result["exactness"]
    assert exact["passed"] and exact["proofs"]
    assert exact["logits"] <= 1e-5 < exact["logits_with_a_changed_weight"]


def test_the_model_is_trained_and_fusing_costs_less_than_dropping_attention(result: dict[str, Any]) -> None:
    loss = {name: found["loss"]["value"] for name, found in result["quality"].items()}
    assert result["quality"]["intact"]["perplexity"]["value"] < 30
    assert loss["intact"] < loss["attention_removed"]
    assert loss["fused_fold"] - loss["attention_removed"] < loss["attention_removed"] - loss["intact"]


def test_the_report_is_there(result: dict[str, Any]) -> None:
    assert Path(result["html"]).read_text("utf-8").startswith("<!DOCTYPE html>")
    assert result["report"]["summary"]["groups"] >= 1
    assert all(refusal["code"] and refusal["message"] for refusal in result["report"]["graphs"][0]["refusals"])
