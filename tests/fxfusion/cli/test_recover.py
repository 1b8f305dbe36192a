"""`fxfusion recover`: two folders in, a folder out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxfusion
from fxfusion.recovery import distil
from tests.fxfusion.cli.conftest import Run
from tests.fxfusion.recovery.own_text import LENGTH, PLAN, model_of, own_text

STEPS = ["--steps", 8, "--every", 4, "--learning-rate", 2e-3]
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")


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
    assert ran.code == 2 and "--reference: give a folder" in ran.error
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all my work")
    ran = run(*given)
    assert ran.code == 1 and "thesis.tex" in ran.error


def test_nothing_is_written_where_nothing_helps(run: Run, folders: Path, tmp_path: Path) -> None:
    ran = run(*arguments(folders, "fused", tmp_path / "out"), "--learning-rate", 5, "--steps", 1)
    assert ran.code == 1 and "nothing was better than the start" in ran.error and not (tmp_path / "out").exists()
