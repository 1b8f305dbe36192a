"""No command writes over what it reads, or over what fxfusion did not write, unless that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxfusion
from fxfusion.files import RECORD
from tests.fxfusion.cli.conftest import SMALL, Run, make_text

Words = list[Any]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, model: Path, text: Path) -> Path:
    """`model`, `intact`, `fused` (canonical), `text.txt`, `plan.yaml`, and a folder and files of somebody."""
    for name in ("model", "intact"):
        shutil.copytree(model, tmp_path / name)
    shutil.copy(text, tmp_path / "text.txt")
    plan = fxfusion.FusionPlan(dropped_attention=[2], groups=[[1, 2]])
    plan.save(tmp_path / "plan.yaml")
    fxfusion.save_pretrained(fxfusion.from_pretrained(model), tmp_path / "fused", plan=plan)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"all names": "are those of a checkpoint"}')
    for name in ("mine.html", "mine.csv", "mine.json", "mine.yaml"):
        (tmp_path / name).write_text("mine")
    return tmp_path


def measuring(place: Path) -> Words:
    return ["--text", place / "text.txt", "--results", place / "results", *SMALL]


def recover(place: Path, out: str) -> Words:
    return ["recover", place / "fused", "--reference", place / "intact", "--output", place / out, *measuring(place)]


FOLDERS: dict[str, Callable[[Path, str], Words]] = {
    "fuse": lambda place, out: ["fuse", place / "model", "--output", place / out, "--plan", place / "plan.yaml"],
    "export": lambda place, out: ["export", place / "model", "--output", place / out],
    "unfuse": lambda place, out: ["unfuse", place / "fused", "--output", place / out],
    "refit": lambda p, out: ["refit", p / "model", "--output", p / out, "--plan", p / "plan.yaml", *measuring(p)],
    "auto": lambda place, out: ["auto", place / "model", "--output", place / out, *measuring(place)],
    "recover": recover,
}
READS = {
    "fuse": ["model", "."],
    "export": ["model", "."],
    "unfuse": ["fused", "."],
    "refit": ["model", "results", "."],
    "auto": ["model", "results", "."],
    "recover": ["fused", "intact", "results", "."],
}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_read_is_never_written_over(command: str, place: Path, run: Run) -> None:
    before = content(place)
    for out in READS[command]:
        for more in ([], ["--overwrite"]):
            found = run(*FOLDERS[command](place, out), *more)
            assert found.code == 2 and "which the same command reads: it would be lost" in found.error
    assert content(place) == before


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_of_others_is_refused_before_anything_is_read(
    command: str, place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(place)
    for name in ("fxfusion.checkpoints.api.from_pretrained", "fxfusion.cli.inputs.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a model was loaded"))
    found = run(*FOLDERS[command](place, "mine"))
    assert found.code == 1 and "it holds config.json, which is by others" in found.error
    assert "--overwrite" in found.error and content(place) == before


def test_it_is_replaced_on_request_and_then_without(place: Path, run: Run) -> None:
    for more in (["--overwrite"], []):
        found = run(*FOLDERS["fuse"](place, "mine"), *more)
        assert found.code == 0, found.err
    assert (place / "mine" / RECORD).is_file() and len(fxfusion.from_pretrained(place / "mine").model.layers) == 2


FILES: dict[str, tuple[str, Callable[[Path, str], Words]]] = {
    "explain": ("html", lambda place, out: ["explain", place / "model", "--output", place / out]),
    "report": ("html", lambda place, out: ["report", "--results", place / "results", "--output", place / out]),
    "simulate": (
        "csv",
        lambda p, out: ["simulate", p / "model", "--plan", p / "plan.yaml", "--sweep", "--output", p / out],
    ),
    "calibrate": ("json", lambda place, out: ["simulate", "--calibrate", "--output", place / out]),
    "plan": ("yaml", lambda place, out: ["plan", place / "model", "--output", place / out, *measuring(place)]),
}


@pytest.mark.parametrize("command", FILES)
def test_a_file_of_others_is_refused_at_once(
    command: str, place: Path, scored: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, words = FILES[command]
    shutil.copytree(scored, place / "results")
    before = content(place)
    monkeypatch.setattr("fxfusion.cli.inputs.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    found = run(*words(place, f"mine.{suffix}"))
    assert found.code == 2 and "as fxfusion wrote it" in found.error and "--overwrite" in found.error
    assert content(place) == before


@pytest.mark.parametrize("command", ["explain", "report", "simulate"])
def test_files_are_replaced_on_request_and_then_without(command: str, place: Path, scored: Path, run: Run) -> None:
    suffix, words = FILES[command]
    shutil.copytree(scored, place / "results")
    for more in (["--overwrite"], []):
        found = run(*words(place, f"mine.{suffix}"), *more)
        assert found.code in (0, 3), found.err
    assert (place / f"mine.{suffix}").read_text() != "mine"


@pytest.mark.parametrize("name", ["text.txt", "model/config.json", "plan.yaml"])
def test_a_file_that_is_read_is_kept_even_on_request(name: str, place: Path, run: Run) -> None:
    before = content(place)
    words = ["explain", place / "model", "--plan", place / "plan.yaml", "--output", place / name, "--overwrite"]
    if name == "text.txt":
        words = ["plan", place / "model", "--output", place / name, *measuring(place), "--overwrite"]
    found = run(*words)
    assert found.code == 2 and "same command" in found.error
    assert content(place) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("score", "model.json"),
        ("score", "scores_loss.json"),
        ("matrix", "matrix_/heat_map.png"),
        ("eval", "quality.json"),
        ("sweep", "sweep.csv"),
        ("plan", "plan.yaml"),
    ],
)
def test_files_in_the_results_folder_that_are_not_ours(
    command: str, name: str, place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = place / "results" / name
    target.parent.mkdir(parents=True)
    target.write_text("{}")
    monkeypatch.setattr("fxfusion.cli.inputs.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    found = run(command, place / "model", *measuring(place))
    assert found.code == 2 and f"{target} is there, and is no " in found.error
    assert target.read_text() == "{}"


def test_a_plan_that_was_edited_by_hand_is_kept(place: Path, run: Run) -> None:
    words = ["plan", place / "model", "--drop", "1", *measuring(place)]
    make_text(place / "text.txt", words=600)
    assert run(*words).code == 0 and run(*words).code == 0
    plan = place / "results" / "plan.yaml"
    plan.write_text(plan.read_text() + "# mine\n")
    found = run(*words)
    assert found.code == 2 and "plan.yaml is there, and is no plan as fxfusion wrote it" in found.error
    assert plan.read_text().endswith("# mine\n")
    assert run(*words, "--overwrite").code == 0 and "# mine" not in plan.read_text()


@pytest.mark.parametrize("command", ["fuse", "refit", "auto"])
def test_a_layout_that_cannot_hold_the_model_is_refused_at_once(
    command: str, place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fxfusion.checkpoints.api.from_pretrained", "fxfusion.cli.inputs.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a model was loaded"))
    fxfusion.save_pretrained(_opt(), place / "opt", tokenizer=None)
    shutil.rmtree(place / "model")
    (place / "opt").rename(place / "model")
    found = run(*FOLDERS[command](place, "out"), "--format", "nemotron-nas")
    assert found.code == 1 and "nemotron-nas" in found.error


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 40, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=40, num_hidden_layers=3, **sizes)).eval()
