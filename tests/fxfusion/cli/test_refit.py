"""`fxfusion refit`: a folder, a plan and text in, a refitted folder out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxfusion
from tests.fxfusion.cli.conftest import Run, call
from tests.fxfusion.recovery.own_text import LENGTH, PLAN, model_of, own_text

SMALL = ["--length", LENGTH, "--batch", 16, "--sequences", 96]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `plan.yaml` and `text.safetensors`; `out` is a refitted folder."""
    folder = tmp_path_factory.mktemp("refit")
    model_of().save_pretrained(folder / "model")
    fxfusion.FusionPlan(**PLAN).save(folder / "plan.yaml")
    save_file({"input_ids": torch.cat(own_text())}, folder / "text.safetensors")
    assert call(*words(folder, folder / "out")) == 0
    return folder


def words(folder: Path, out: Path) -> list[Any]:
    given = ["refit", folder / "model", out, "--plan", folder / "plan.yaml", "--text", folder / "text.safetensors"]
    return [*given, *SMALL, "--results", folder / "results"]


def loss(model: Any) -> float:
    return float(fxfusion.evaluate(model, own_text(seed=7), resamples=100).loss)


def test_the_folder_loads_as_the_refitted_model(place: Path) -> None:
    loaded = fxfusion.from_pretrained(place / "out")
    assert loss(loaded) < loss(fxfusion.fuse(model_of(), PLAN)) - 0.01
    record = fxfusion.FusionPlan.load(place / "out" / "fxfusion_plan.yaml").refit
    assert record is not None and record.reference == "intact" and record.loss_after < record.loss_before
    assert loaded.config.fxfusion["refit"]["fingerprint"] == record.fingerprint
    assert "refitted in closed form to the intact model" in (place / "out" / "README.md").read_text()


def test_only_what_was_refitted_is_changed(place: Path) -> None:
    before, after = (load_file(place / name / "model.safetensors") for name in ("model", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if ".1.self_attn." in name or ".2.self_attn." in name}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in (1, 2)}
    refitted = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)}
    assert changed <= attention | norms | refitted | {"model.layers.3.self_attn.o_proj.weight"}
    assert {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)} <= changed


def test_engines_get_the_refitted_weights(run: Run, place: Path, tmp_path: Path) -> None:
    ran = run(*words(place, tmp_path / "out"), "--format", "nemotron-nas", "--json")
    assert ran.code == 0 and ran.json["refit"]["reference"] == "intact"  # from what is in --results
    one, other = (fxfusion.from_pretrained(folder) for folder in (tmp_path / "out", place / "out"))
    ids = own_text()[0][:2]
    with torch.no_grad():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)


def test_a_dry_run_writes_nothing(run: Run, place: Path, tmp_path: Path) -> None:
    ran = run(*words(place, tmp_path / "out"), "--dry-run", "--json")
    assert ran.code == 0 and ran.json["dry_run"] is True and str(tmp_path / "out") in ran.json["writes"]
    assert not list(tmp_path.iterdir())


def test_noise_is_refused_and_nothing_is_written(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "it")
    noise = torch.randint(3, 97, (96, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": noise}, tmp_path / "it" / "text.safetensors")
    ran = run(*words(tmp_path / "it", tmp_path / "new"))
    assert ran.code == 2 and "noise, or another language" in ran.error and not (tmp_path / "new").exists()


def test_a_plan_is_needed(run: Run, place: Path, tmp_path: Path) -> None:
    ran = run("refit", place / "model", tmp_path / "out", "--text", place / "text.safetensors")
    assert ran.code == 2 and "--plan" in ran.error


def test_a_refitted_folder_is_not_refitted_again(run: Run, place: Path, tmp_path: Path) -> None:
    given = words(place, tmp_path / "more")
    given[1] = place / "out"
    ran = run(*given)
    assert ran.code == 1 and "was refitted already" in ran.error and not (tmp_path / "more").exists()


def test_a_refitted_folder_is_not_taken_for_the_intact_model(run: Run, place: Path, tmp_path: Path) -> None:
    text = ["--text", place / "text.safetensors", "--results", tmp_path / "results"]
    ran = run("score", place / "out", *text)
    assert ran.code == 1 and "was refitted already" in ran.error


def test_a_model_is_not_written_over_itself(run: Run, place: Path) -> None:
    ran = run(*words(place, place / "model"))
    assert ran.code == 2 and "which the same command reads: it would be lost" in ran.error
