"""`fxfusion export --format gguf`: a file, how to run it, and refusals that leave what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fxfusion.checkpoints.gguf_models import write_gguf
from tests.fxfusion.cli.conftest import Run

GGUF = ("--format", "gguf", "--output")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    return tmp_path / "tiny.gguf"


@pytest.mark.slow
def test_a_written_file_says_how_to_run_it_and_passes_check(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    found = run("export", file, *GGUF, out, "--gguf-type", "q8_0")
    assert found.code == 0, found.err
    assert f"llama-cli -m {out}" in found.out.strip().splitlines()[-1]
    assert run("check", out).code == 0
    out.write_bytes(out.read_bytes()[:-100])
    assert run("check", out).code != 0


@pytest.mark.slow
def test_a_dry_run_writes_nothing(run: Run, file: Path, tmp_path: Path) -> None:
    found = run("export", file, *GGUF, tmp_path / "x.gguf", "--dry-run", "--json")
    assert found.code == 0, found.err
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.slow
def test_another_file_is_not_replaced(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("mine")
    found = run("export", file, *GGUF, out)
    assert found.code != 0 and str(out) in found.error
    assert out.read_text() == "mine"


@pytest.mark.slow
def test_a_folder_is_no_target(run: Run, file: Path, tmp_path: Path) -> None:
    assert ".gguf" in run("export", file, *GGUF, tmp_path / "folder").error
    assert not (tmp_path / "folder").exists()
