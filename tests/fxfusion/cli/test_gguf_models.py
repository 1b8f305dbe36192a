"""A GGUF file where a command takes a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fxfusion
from fxfusion.cli import inputs
from tests.fxfusion.checkpoints.gguf_models import LAYERS, write_gguf
from tests.fxfusion.cli.conftest import SMALL, Run, make_text

TOLD = "tiny.gguf: llama, Q8_0 (also F32); weights dequantised to float32"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    fxfusion.FusionPlan(groups=[[0, 1]], hoist=True).save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_explain_needs_its_header_only(run: Run, file: Path, plan: Path) -> None:
    found = run("explain", file, "--plan", plan, "--json")
    assert found.code == 0 and len(found.json["graphs"][0]["groups"]) == 1
    assert "tiny.gguf: llama, Q8_0 (also F32)" in found.err and "dequantised" not in found.err


def test_a_model_is_measured_as_its_folder_is(run: Run, file: Path, tmp_path: Path) -> None:
    """The same losses, and the same results folder: the file and the folder saved from it are one model."""
    text = make_text(tmp_path / "text.txt")
    common = ("--text", text, *SMALL, "--results", tmp_path / "results", "--json")
    first = run("score", file, *common)
    assert first.code == 0 and TOLD in first.err
    fxfusion.save_pretrained(fxfusion.from_pretrained(file), tmp_path / "folder")
    again = run("score", tmp_path / "folder", *common)
    assert again.code == 0 and again.json["scores"] == first.json["scores"]
    assert json.loads((tmp_path / "results" / "model.json").read_text())["name"] == "tiny.gguf"


def test_fused_it_is_a_folder_that_generates(run: Run, file: Path, plan: Path, tmp_path: Path) -> None:
    fused = run("fuse", file, "--plan", plan, "--output", tmp_path / "fused", "--json")
    assert fused.code == 0 and TOLD in fused.err and fused.json["before"]["layers"] == LAYERS
    told = {}
    for model, more in ((file, ("--plan", plan)), (tmp_path / "fused", ())):
        found = run("generate", model, "--prompt", "1 2 3", "--new-tokens", 4, *more, "--json")
        assert found.code == 0, found.err
        told[model] = found.json["texts"][0]["tokens"]
    assert told[file] == told[tmp_path / "fused"]


def test_a_dry_run_reads_no_weights(run: Run, file: Path, plan: Path, tmp_path: Path) -> None:
    found = run("fuse", file, "--plan", plan, "--output", tmp_path / "fused", "--dry-run", "--json")
    assert found.code == 0 and found.json["after"]["groups"] and not (tmp_path / "fused").exists()
    assert "tiny.gguf: llama, Q8_0" in found.err


def test_check_looks_at_it_like_at_a_folder(run: Run, file: Path) -> None:
    found = run("check", file, "--json")
    wanted = ["files", "layers", "loads", "computes", "cache"]
    assert found.code == 0 and [row["what"] for row in found.json["checks"]] == wanted
    assert found.json["checks"][0]["detail"].startswith("21 tensors, ")


def test_simulate_takes_its_shapes(run: Run, file: Path) -> None:
    found = run("simulate", file, "--json")
    assert found.code == 0 and "llama, Q8_0" in found.err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-300]), "cut short"),
        (lambda file: file.write_bytes(b"\x80\x04" * 50), "is no GGUF file"),
        (lambda file: write_gguf(file, architecture="nothing"), "architecture 'nothing'"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "fuse", "score", "generate", "check"])
def test_a_file_that_cannot_be_read_is_an_error_before_long_work(
    run: Run, file: Path, plan: Path, tmp_path: Path, change: Any, named: str, command: str
) -> None:
    change(file)
    text = make_text(tmp_path / "text.txt")
    more = {
        "fuse": ("--plan", plan, "--output", tmp_path / "out"),
        "score": ("--text", text, *SMALL, "--results", tmp_path / "results"),
        "generate": ("--prompt", "1"),
    }
    found = run(command, file, *more.get(command, ()))
    said = found.out if command == "check" and found.code == 1 and "FAIL" in found.out else found.error
    assert found.code != 0 and named in said and str(file) in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize("option", ["MODEL", "--baseline", "--reference", "--draft"])
def test_every_command_names_the_architecture_of_a_file_that_it_cannot_read(
    run: Run, file: Path, plan: Path, model: Path, tmp_path: Path, option: str
) -> None:
    bad, text = tmp_path / "bad.gguf", make_text(tmp_path / "text.txt")
    write_gguf(bad, architecture="nothing")
    measured = ("--text", text, *SMALL, "--results", tmp_path / "results")
    out = ("--output", tmp_path / "out")
    commands: dict[str, tuple[object, ...]] = {
        "--baseline": ("eval", model, *measured, "--baseline", bad),
        "--reference": ("recover", model, *measured, *out, "--reference", bad),
        "--draft": ("generate", model, "--prompt", "1", "--draft", bad),
    }
    lines = [commands[option]] if option != "MODEL" else [
        *((name, bad, *measured) for name in ("score", "matrix", "sweep", "eval")),
        ("plan", bad, *measured, "--drop", 1),
        ("auto", bad, *measured, *out),
        ("refit", bad, *measured, *out, "--plan", plan),
        ("recover", bad, *measured, *out, "--reference", model),
        ("export", bad, *out),
        ("simulate", bad),
    ]  # fmt: skip
    for line in lines:
        found = run(*line)
        assert found.code != 0 and "architecture 'nothing'" in found.error and str(bad) in found.error, line[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "results").exists()


def test_unfuse_says_that_a_file_holds_no_plan(run: Run, file: Path, tmp_path: Path) -> None:
    assert "tiny.gguf has no fxfusion_plan.yaml" in run("unfuse", file, "--output", tmp_path / "out").error


def test_a_file_is_not_written_over(run: Run, file: Path, plan: Path) -> None:
    found = run("fuse", file, "--plan", plan, "--output", file.parent, "--overwrite")
    assert found.code != 0 and "it would be lost" in found.error and file.exists()


def test_a_folder_with_nothing_but_a_file_names_it(run: Run, file: Path) -> None:
    (file.parent / "alone").mkdir()
    file.rename(file.parent / "alone" / file.name)
    assert f"give {file.parent / 'alone' / file.name} " in run("explain", file.parent / "alone").error
    other = file.parent / "model.bin"
    other.write_bytes(b"\x80\x04")
    assert "neither a model folder nor a GGUF file" in run("explain", other).error


def test_without_the_package_the_extra_is_named(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.checkpoints.gguf import header

    monkeypatch.setattr(header, "find_spec", lambda name: None)
    assert "pip install 'fxfusion[real]'" in run("explain", file).error


def test_a_tokenizer_that_is_not_there_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tokenizer=False)
    with pytest.raises(fxfusion.FxFusionError, match=r"tiny\.gguf has no tokenizer .*\.safetensors"):
        inputs.load_tokenizer(tmp_path / "tiny.gguf")
