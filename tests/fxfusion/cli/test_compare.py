from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.fxfusion.cli.conftest import SMALL, Run
from tests.fxfusion.recovery.own_text import LENGTH, model_of, own_text

pytestmark = pytest.mark.slow


@pytest.fixture
def args(model: Path, ids: Path, results: Path) -> list[object]:
    return ["compare", model, "--text", ids, "--results", results, *SMALL]


def test_a_comparison_is_shown_kept_and_gone_on_from(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that predicts its own text: no other could be refitted."""
    model, text, results = (tmp_path / name for name in ("model", "text.safetensors", "results"))
    model_of().save_pretrained(model)
    save_file({"input_ids": torch.cat(own_text()).to(torch.int32)}, text)
    sizes = ["--length", LENGTH, "--batch", 16, "--sequences", 96]
    asked = ["compare", model, "--text", text, "--results", results, *sizes, "--depths", 3, "--refit"]
    asked += ["--methods", "shortgpt,ffn-drop,replaceme"]
    ran = run(*asked, "--json")
    assert ran.code == 0, ran.err
    names = [(cell["method"], cell["repaired"]) for cell in ran.json["cells"]]
    assert names == [("shortgpt", False), ("shortgpt", True), ("ffn-drop", False), ("replaceme", False)]
    assert not [cell["problem"] for cell in ran.json["cells"] if cell["problem"]]
    assert all(cell["ffns"] == 3 and cell["quality"]["kl"]["value"] >= 0 for cell in ran.json["cells"])
    assert ran.json["best"].keys() == {"3"} and "comparison" in ran.err
    kept = json.loads((results / "comparison.json").read_text())
    assert kept["cells"] == ran.json["cells"] and kept["text"]["sequences"] == 96
    rows = list(csv.DictReader((results / "comparison.csv").open()))
    assert [row["method"] for row in rows] == [name for name, _ in names]
    assert "<svg" in (results / "comparison.svg").read_text()

    monkeypatch.setattr("fxfusion.planning.arena.evaluate", lambda *_, **__: pytest.fail("measured again"))
    shown = run(*asked, "--output", tmp_path / "table.csv")
    assert shown.code == 0, shown.err
    assert "shortgpt + refit" in shown.out and "least KL at its depth" in shown.out
    assert (tmp_path / "table.csv").read_text() == (results / "comparison.csv").read_text()


def test_what_cannot_be_is_said_before_the_model_is_loaded(
    run: Run, args: list[object], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxfusion.cli.inputs.load_model", lambda *_, **__: pytest.fail("loaded"))
    for more, message in (
        (["--depths", "2,3"], "depths: 3 is not between 1 and 2: the model has 3 FFNs"),
        (["--depths", "x"], "--depths"),
        (["--methods", "guess"], "expected some of drop, hoist"),
        (["--sequences", 4], "two batches of text"),
        (["--tp", 3], "tp 3 does not divide"),
        (["--hardware", "abacus"], "abacus"),
        (["--text", "nowhere.txt"], "there is no file or folder nowhere.txt"),
    ):
        ran = run(*args, *more)
        assert ran.code != 0 and message in ran.error
    results.mkdir(exist_ok=True)
    (results / "comparison.csv").write_text("mine")
    assert "comparison.csv" in run(*args).error
    (results / "comparison.csv").unlink()
    dry = run(*args, "--dry-run", "--refit")
    assert dry.code == 0 and "choosing for 11 cells" in dry.out, dry.err
