"""FXFUSION_DEBUG: what each step of the ladder shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxfusion.errors import OptionError
from fxfusion.graph import debug
from tests.helpers import Attention, Stack, fuse, randomise, stack, tokens


def shown_at(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> tuple[str, list[Path]]:
    """What is printed, and the files that are written, while one model is fused."""
    monkeypatch.setenv("FXFUSION_DEBUG", level)
    monkeypatch.setenv("FXFUSION_DEBUG_DIR", str(folder / level))
    model = Stack([Attention(), *stack().layers])
    randomise(model)
    fuse(model, tokens())
    return capsys.readouterr().out, sorted((folder / level).rglob("*.txt"))


def test_the_ladder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = {level: shown_at(level, monkeypatch, capsys, tmp_path) for level in "01234"}
    assert found["0"] == ("", [])
    assert "concatenate" in found["1"][0] and "3 fused into 1" in found["1"][0]
    assert "token_mixing" not in found["1"][0] and not found["1"][1]
    assert "not fused: " in found["2"][0] and "token_mixing" in found["2"][0] and not found["2"][1]
    assert "candidate" not in found["3"][0]
    assert "candidate" in found["4"][0] and "FFN layers.2.ffn" in found["4"][0]
    for level in "34":
        before, after = (
            next(file.read_text() for file in found[level][1] if file.name.endswith(f"_concatenate.{when}.txt"))
            for when in ("before", "after")
        )
        assert before.count("linear") > after.count("linear") > 0


def test_dumps_replace_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Graphs that die give their address to others; what was written of them stays."""
    monkeypatch.setenv("FXFUSION_DEBUG", "3")
    monkeypatch.setenv("FXFUSION_DEBUG_DIR", str(tmp_path))
    (tmp_path / "graph_0001_note.txt").write_text("mine")
    before: dict[Path, str] = {}
    for _ in range(3):
        fuse(stack(), tokens())
        now = {file: file.read_text() for file in tmp_path.rglob("*.txt")}
        assert all(now[file] == text for file, text in before.items()) and len(now) > len(before)
        before = now


@pytest.mark.parametrize("value", ["5", "-1", "yes", "1.0"])
def test_bad_values_are_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSION_DEBUG", value)
    with pytest.raises(OptionError, match=f"FXFUSION_DEBUG: expected 0, 1, 2, 3 or 4, got '{value}'"):
        debug.level()


def test_empty_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSION_DEBUG", "")
    assert debug.level() == 0
    monkeypatch.delenv("FXFUSION_DEBUG")
    assert debug.level() == 0


def test_lines_also_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "fxfusion"):
        fuse(stack(), tokens())
    assert any("concatenate" in record.getMessage() for record in caplog.records)
