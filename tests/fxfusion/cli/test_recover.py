"""`fxfusion refit` and `recover`: folders and text in, a folder out."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxfusion
from fxfusion.recovery import distil
from tests.fxfusion.cli.conftest import Run, call
from tests.fxfusion.recovery.own_text import LENGTH, PLAN, model_of, own_text

STEPS = ["--steps", 8, "--every", 4, "--learning-rate", 2e-3]
SMALL = ["--length", LENGTH, "--batch", 16, "--sequences", 96]
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")


# --- refit --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `plan.yaml` and `text.safetensors`."""
    folder = tmp_path_factory.mktemp("refit")
    model_of().save_pretrained(folder / "model")
    fxfusion.FusionPlan(**PLAN).save(folder / "plan.yaml")
    save_file({"input_ids": torch.cat(own_text())}, folder / "text.safetensors")
    return folder


@pytest.fixture(scope="module")
def refitted(place: Path) -> Path:
    """The same, with a refitted folder `out`; half a minute, so tests with it are slow."""
    assert call(*words(place, place / "out")) == 0
    return place


def words(folder: Path, out: Path) -> list[Any]:
    given = [
        "refit",
        folder / "model",
        "--output",
        out,
        "--plan",
        folder / "plan.yaml",
        "--text",
        folder / "text.safetensors",
    ]
    return [*given, *SMALL, "--results", folder / "results"]


def loss(model: Any) -> float:
    return float(fxfusion.evaluate(model, own_text(seed=7), resamples=100).loss)


@pytest.mark.slow
def test_the_folder_loads_as_the_refitted_model(refitted: Path) -> None:
    loaded = fxfusion.from_pretrained(refitted / "out")
    assert loss(loaded) < loss(fxfusion.fuse(model_of(), PLAN)) - 0.01
    record = fxfusion.FusionPlan.load(refitted / "out" / "fxfusion_plan.yaml").refit
    assert record is not None and record.reference == "intact" and record.loss_after < record.loss_before
    assert loaded.config.fxfusion["refit"]["fingerprint"] == record.fingerprint
    assert "refitted in closed form to the intact model" in (refitted / "out" / "README.md").read_text()


@pytest.mark.slow
def test_only_what_was_refitted_is_changed(refitted: Path) -> None:
    before, after = (load_file(refitted / name / "model.safetensors") for name in ("model", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if ".1.self_attn." in name or ".2.self_attn." in name}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in (1, 2)}
    ends = [f"{layer}.mlp.{name}_proj" for layer in (1, 2, 3) for name in ("gate", "up", "down")]
    ends += [f"3.self_attn.{name}_proj" for name in "qkvo"]
    assert changed <= attention | norms | {f"model.layers.{end}.weight" for end in ends}
    assert {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)} <= changed


@pytest.mark.slow
def test_engines_get_the_refitted_weights(run: Run, refitted: Path, tmp_path: Path) -> None:
    ran = run(*words(refitted, tmp_path / "out"), "--format", "nemotron-nas", "--json")
    assert ran.code == 0 and ran.json["refit"]["reference"] == "intact"  # from what is in --results
    one, other = (fxfusion.from_pretrained(folder) for folder in (tmp_path / "out", refitted / "out"))
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
    ran = run("refit", place / "model", "--output", tmp_path / "out", "--text", place / "text.safetensors")
    assert ran.code == 2 and "Missing option '--plan'" in ran.err


@pytest.mark.slow
def test_a_refitted_folder_is_not_refitted_again(run: Run, refitted: Path, tmp_path: Path) -> None:
    given = words(refitted, tmp_path / "more")
    given[1] = refitted / "out"
    ran = run(*given)
    assert ran.code == 1 and "was refitted already" in ran.error and not (tmp_path / "more").exists()


def test_a_model_is_not_written_over_itself(run: Run, place: Path) -> None:
    ran = run(*words(place, place / "model"))
    assert ran.code == 2 and "which the same command reads: it would be lost" in ran.error


# --- recover ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`intact`, `fused` (canonical), `export` (nemotron-nas), and `ids.safetensors`; not to be changed."""
    root = tmp_path_factory.mktemp("recover")
    model_of().save_pretrained(root / "intact")
    fxfusion.save_pretrained(fxfusion.fuse(model_of(), PLAN), root / "fused")
    save_file({"input_ids": torch.cat(own_text()).contiguous()}, root / "ids.safetensors")
    return root


def arguments(root: Path, folder: str, out: Path) -> list[Any]:
    text = ["--text", root / "ids.safetensors", "--length", LENGTH, "--batch", 8, "--sequences", 96]
    own = ["--reference", root / "intact", "--output", out, "--results", out.with_suffix(".results")]
    return ["recover", root / folder, *own, *text, *STEPS]


def kl(model: Any) -> float:
    found = fxfusion.evaluate(model, own_text(batches=2, seed=7), model_of(), resamples=100).kl
    assert found is not None
    return float(found)


def test_a_folder_that_predicts_more_like_the_intact_model(run: Run, folders: Path, tmp_path: Path) -> None:
    ran = run(*arguments(folders, "fused", tmp_path / "out"), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["kl_after"] < ran.json["kl_before"] and ran.json["steps"] == 8
    assert [row["step"] for row in ran.json["curve"]] == list(range(1, 9))
    recovered = fxfusion.from_pretrained(tmp_path / "out")
    assert len(recovered.model.layers) == 3
    assert kl(recovered) < 0.95 * kl(fxfusion.from_pretrained(folders / "fused"))
    assert "Distilled from the intact model over 8 steps" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_ctrl_c_and_on(run: Run, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil.Step

    def stopping(**given: Any) -> Any:
        if given["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(**given)

    monkeypatch.setattr(distil, "Step", stopping)
    ran = run(*arguments(folders, "fused", tmp_path / "out"))
    assert ran.code == 1 and "interrupted" in ran.error and not (tmp_path / "out").exists()
    monkeypatch.undo()
    ran = run(*arguments(folders, "fused", tmp_path / "out"), "--json")
    assert ran.code == 0 and [row["step"] for row in ran.json["curve"]] == [4, 5, 6, 7, 8]


def test_a_dry_run_and_wrong_use(run: Run, folders: Path, tmp_path: Path) -> None:
    given = arguments(folders, "fused", tmp_path / "out")
    ran = run(*given, "--dry-run", "--json")
    assert ran.code == 0 and ran.json["writes"][0] == str(tmp_path / "out") and list(tmp_path.iterdir()) == []
    ran = run("recover", folders / "fused", "--text", folders / "ids.safetensors")
    assert ran.code == 2 and "Missing option '--reference'" in ran.err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all my work")
    ran = run(*given)
    assert ran.code == 1 and "thesis.tex" in ran.error


def test_nothing_is_written_where_nothing_helps(run: Run, folders: Path, tmp_path: Path) -> None:
    ran = run(*arguments(folders, "fused", tmp_path / "out"), "--learning-rate", 5, "--steps", 1)
    assert ran.code == 1 and "nothing was better than the start" in ran.error and not (tmp_path / "out").exists()
