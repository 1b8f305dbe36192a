"""What fxfusion did not write, or somebody changed since, is not replaced; every function with a path goes by that."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfusion
from fxfusion import files
from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.analysis.heat_map import heat_map
from fxfusion.cost.gain import GainPoint, Gains
from fxfusion.cost.hardware import Hardware
from fxfusion.errors import FxFusionError, OptionError, PlanError
from fxfusion.files import RECORD, check_apart, check_file, replacing
from fxfusion.planning.sweep import Sweep
from fxfusion.report.model import FusionReport
from fxfusion.report.results import Results
from fxfusion.report.results_page import write_results_page


def put(path: Path, text: str, kind: str = "note", **more: Any) -> None:
    with replacing(path, kind, **more) as beside:
        beside.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_here_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        put(tmp_path / "deep" / "a.txt", text)
        assert (tmp_path / "deep" / "a.txt").read_text() == text
    assert names(tmp_path / "deep") == [RECORD, "a.txt"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": lambda path: path.write_text("ONE"),
    "replaced": lambda path: (path.unlink(), path.write_text("other")),
    "record gone": lambda path: (path.parent / RECORD).unlink(),
    "record broken": lambda path: (path.parent / RECORD).write_text("{"),
    "record of another": lambda path: (path.parent / RECORD).write_text(json.dumps({"files": {"a.txt": {"kind": 1}}})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_is_kept_unless_that_is_asked_for(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    put(path, "one")
    CHANGES[change](path)
    before = path.read_text()
    for attempt in (lambda: put(path, "two"), lambda: check_file(path, "note")):
        with pytest.raises(OptionError, match=r"a\.txt is there, and is no note as fxfusion wrote it: .*--overwrite"):
            attempt()
    assert path.read_text() == before
    put(path, "two", overwrite=True)
    put(path, "three")
    assert path.read_text() == "three"


def test_another_kind_of_file_is_not_replaced(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "one", "plan")
    with pytest.raises(PlanError, match="is no report as"):
        put(tmp_path / "a.txt", "two", "report", error=PlanError)


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_process_that_dies_leaves_its_file_known(
    survives: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it dies: before the record is written, before the file takes its place, after it."""
    path, replace, done = tmp_path / "a.txt", os.replace, list[Any]()
    put(path, "one")

    def dying(source: Any, target: Any) -> None:
        if len(done) < survives:
            replace(source, target)
        done.append(target)
        if len(done) > min(survives, 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dying)
        put(path, "two")
    assert path.read_text() == ("two" if survives == 2 else "one") and names(tmp_path) == [RECORD, "a.txt"]
    put(path, "three")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    put(path, "old")
    for error, raised in ((OSError(28, "No space left"), OptionError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised), replacing(path, "note") as beside:
            assert beside.suffix == ".svg" and beside.parent == tmp_path
            beside.write_text("half")
            raise error
        assert path.read_text() == "old" and names(tmp_path) == [RECORD, "plot.svg"]


def test_a_link_and_permissions_stay(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.txt", "one")
    (tmp_path / "real" / "a.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real/a.txt")
    put(tmp_path / "link.txt", "two")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real" / "a.txt").read_text() == "two"
    assert (tmp_path / "real" / "a.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("path", ["folder", "", "a\0b", "file/inside"])
def test_names_that_no_file_can_have_are_errors(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OptionError):
        put(path, "x")  # type: ignore[arg-type]
    assert names(tmp_path) == ["file", "folder"]


def test_what_a_command_reads_is_kept_even_with_overwrite(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    (model / "config.json").write_text("{}")
    text.write_text("words")
    (tmp_path / "other.txt").symlink_to(text)
    os.link(text, tmp_path / "hard.txt")
    for path in (text, tmp_path / "other.txt", tmp_path / "hard.txt", model / "config.json"):
        with pytest.raises(OptionError, match="the same command"):
            check_file(path, "plan", overwrite=True, reads=[model, text])
    check_file(model / "new.yaml", "plan", reads=[model, text])
    for folder in (model, tmp_path):
        with pytest.raises(OptionError, match="which the same command reads: it would be lost"):
            check_apart(folder, [model])
    check_apart(model / "inside", [model])


def test_a_large_file_counts_by_size_time_and_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WHOLE", 2)
    put(tmp_path / "a.txt", "large")
    put(tmp_path / "a.txt", "larger")
    (tmp_path / "a.txt").write_text("LARGER")
    with pytest.raises(OptionError, match="is no note"):
        put(tmp_path / "a.txt", "x")


def _heat_map(path: Path, **more: Any) -> None:
    parts = dict.fromkeys(("values", "cosine", "ratio", "contribution_cosine"), torch.zeros(2, 2))
    facts = {"unit": "ffn", "layers": (0, 1), "names": ("a", "b"), "attention": (0, 1)}
    known = dict.fromkeys(DependencyMatrix.__dataclass_fields__, 0)
    heat_map(DependencyMatrix(**{**known, **parts, **facts}), path, **more)  # type: ignore[arg-type]


def _gains(path: Path, **more: Any) -> None:
    point = GainPoint(
        launch="cuda-graph", all_reduce="plain", tp=1, batch=1, scale=1.0, hidden=8, before_ms=2.0, after_ms=1.0
    )
    Gains(name="m", hardware="h", precision="bf16", points=(point,)).save(path, **more)


# Every public function that takes the path of a file to write.
WRITERS: dict[str, tuple[str, Callable[..., object]]] = {
    "plan": ("plan.yaml", lambda path, **more: fxfusion.FusionPlan(groups=[[1, 2]]).save(path, **more)),
    "plan as JSON": ("plan.json", lambda path, **more: fxfusion.FusionPlan(groups=[[1, 2]]).save(path, **more)),
    "report": ("report.html", lambda path, **more: FusionReport(graphs=()).to_html(path, **more)),
    "results page": ("page.html", lambda path, **more: write_results_page(Results(), path, **more)),
    "heat map": ("map.svg", _heat_map),
    "sweep": ("sweep.csv", lambda path, **more: Sweep((), 3).to_csv(path, **more)),
    "hardware": ("device.json", lambda path, **more: Hardware.of("h100").save(path, **more)),
    "gains": ("gains.csv", _gains),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_every_writer_of_a_file(name: str, write: Callable[..., object], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("mine")
    with pytest.raises(FxFusionError, match="as fxfusion wrote it"):
        write(path)
    assert path.read_text() == "mine"
    write(path, overwrite=True)
    assert path.read_bytes() != b"mine"
    write(path)
