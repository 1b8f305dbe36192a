"""Commands read nemotron-nas folders as any other model, with our own classes: no code of a folder is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import fxfusion
from fxfusion.cli import inputs
from tests.fxfusion.cli.conftest import SMALL, Run, make_model, make_text
from tests.fxfusion.recovery import own_text

RUNS_CODE = "raise SystemExit('code of the folder was run')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers; attention 2 and 3 dropped, their FFNs and that of layer 1 fused; poisoned code beside it."""
    plain = make_model(tmp_path_factory.mktemp("plain"), layers=6, hidden_size=64, intermediate_size=256)
    model = fxfusion.from_pretrained(plain)
    fxfusion.fuse(model, {"groups": [[1, 2, 3]], "dropped_attention": [2, 3]})
    out = tmp_path_factory.mktemp("nas") / "m"
    fxfusion.save_pretrained(model, out, "nemotron-nas", tokenizer=AutoTokenizer.from_pretrained(plain))
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        (out / name).write_text(RUNS_CODE)
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return make_text(tmp_path / "text.txt", words=1200)


def test_explain_and_its_plan(folder: Path, run: Run) -> None:
    found = run("explain", folder, "--json")
    assert found.code == 3, found.err  # one wide FFN in each run: nothing more to fuse
    planned = run("explain", folder, "--groups", "1-2", "--json")
    assert planned.code == 3 and "code of the folder" not in planned.err
    assert "layer 9 does not exist" in run("explain", folder, "--groups", "9,10").error


def test_the_model_is_that_of_from_pretrained(folder: Path) -> None:
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = inputs.load_model(folder, torch.device("cpu"), "auto")(ids).logits
        assert found.equal(fxfusion.from_pretrained(folder)(ids).logits)
    assert inputs.load_model(folder, torch.device("cpu"), "bfloat16").dtype == torch.bfloat16
    assert inputs.causal_config(folder).model_type == "nemotron-nas"


@pytest.mark.parametrize(
    "command",
    [("score",), ("matrix",), ("plan", "--drop", "1", "--norm", "fold"), ("eval",), ("score", "--dry-run")],
)
def test_measuring_commands_read_it(folder: Path, text: Path, tmp_path: Path, run: Run, command: tuple[str]) -> None:
    name, *options = command
    found = run(name, folder, "--text", text, "--results", tmp_path / "r", "--json", *options, *SMALL)
    assert found.code == 0, found.err
    assert found.json


def test_refit_goes_from_such_a_folder_to_such_a_folder(tmp_path: Path, run: Run) -> None:
    fxfusion.save_pretrained(own_text.model_of(), tmp_path / "m", "nemotron-nas")
    fxfusion.FusionPlan(**own_text.PLAN).save(tmp_path / "plan.yaml")
    save_file({"input_ids": torch.cat(own_text.own_text())}, tmp_path / "ids.safetensors")
    size = ("--length", own_text.LENGTH, "--batch", 16, "--sequences", 96)
    given = ("--plan", tmp_path / "plan.yaml", "--text", tmp_path / "ids.safetensors", *size)
    more = ("--results", tmp_path / "r", "--format", "nemotron-nas")
    found = run("refit", tmp_path / "m", "--output", tmp_path / "out", *given, *more)
    assert found.code == 0, found.err
    assert len(fxfusion.from_pretrained(tmp_path / "out").model.layers) == 3


def test_a_config_that_cannot_be_is_named(folder: Path, tmp_path: Path, run: Run) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 99}))
    assert "block_configs has 4 entries for num_hidden_layers = 99" in run("explain", other).error
