from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fxfusion.cli.results_folder import ResultsFolder, contents, digest
from fxfusion.errors import FxFusionError
from fxfusion.files import RECORD
from fxfusion.plan.fusion_plan import FusionPlan, MadeBy


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "new" / "results")
    assert folder.read("a.json") is None
    folder.write("a.json", {"loss": 1.5, "layers": [1, 2]})
    assert folder.read("a.json") == {"loss": 1.5, "layers": [1, 2]}
    assert sorted(os.listdir(folder.path)) == [RECORD, "a.json"]


@pytest.mark.parametrize("step", ["write_text", "replace", "fsync"])
def test_on_a_full_disk_the_old_file_stays_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = ResultsFolder(tmp_path)
    folder.write("a.json", {"old": 1})
    monkeypatch.setattr(Path if step == "write_text" else os, step, full)
    with pytest.raises(FxFusionError, match=r"a\.json: cannot be written \(nothing was changed\): No space left"):
        folder.write("a.json", {"new": 2})
    monkeypatch.undo()
    assert folder.read("a.json") == {"old": 1} and sorted(os.listdir(tmp_path)) == [RECORD, "a.json"]
    folder.write("a.json", {"new": 2})
    assert folder.read("a.json") == {"new": 2}


def test_what_is_not_ours_is_kept_unless_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"mine": 1}')
    with pytest.raises(FxFusionError, match=r"a\.json is there, and is no file of results as fxfusion wrote it"):
        ResultsFolder(tmp_path).write("a.json", {"new": 2})
    assert ResultsFolder(tmp_path).read("a.json") == {"mine": 1}
    ResultsFolder(tmp_path, overwrite=True).write("a.json", {"new": 2})
    assert ResultsFolder(tmp_path).read("a.json") == {"new": 2}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_a_broken_file_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FxFusionError, match=r"a\.json is broken \(.*\): remove it"):
        ResultsFolder(tmp_path).read("a.json")


def test_results_of_something_else_are_refused_with_what_differs(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    text = {"sources": ["a.txt"], "tokens": 4096, "digest": "1"}
    folder.check_same("auto.json", {"profile": "quick", "text": text})  # there is nothing yet
    folder.write("auto.json", {"profile": "quick", "text": text, "rounds": 6})
    folder.check_same("auto.json", {"profile": "quick", "text": text})
    with pytest.raises(FxFusionError, match=r"results of another profile \(quick, not thorough\); give another folder"):
        folder.check_same("auto.json", {"profile": "thorough", "text": text})
    other = {"sources": ["b.txt"], "tokens": 512, "digest": "2"}
    with pytest.raises(FxFusionError, match=r"another text \(a\.txt, 4,096 tokens, not b\.txt, 512 tokens\)"):
        folder.check_same("auto.json", {"profile": "quick", "text": other})


def test_numbers_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        ResultsFolder(tmp_path).write("a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FxFusionError, match=re.escape(f"--results {tmp_path}/file/results: cannot be made")):
        ResultsFolder(tmp_path / "file" / "results").make()


def test_a_folder_is_about_one_model(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    facts = {"architecture": "A", "weights": "1", "dtype": "float32"}
    folder.check_model(facts, lambda: {"name": "first", "layers": []})
    folder.check_model(dict(facts), lambda: pytest.fail("described twice"))
    for other, named in (({"weights": "2"}, r"model \(first\)"), ({"dtype": "bfloat16"}, r"precision \(float32\)")):
        with pytest.raises(FxFusionError, match=rf"results of another {named}.*--results"):
            folder.check_model(facts | other, dict)
    assert (folder.read("model.json") or {})["name"] == "first"


def test_a_digest_tells_values_apart_and_not_orders_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_contents_leave_out_how_a_plan_was_made() -> None:
    plan = FusionPlan(groups=[[4, 5]], dropped_attention=[5])
    assert contents(plan) == contents(plan.replace(made_by=MadeBy.now("fxfusion plan")))
    assert contents(plan) != contents(plan.replace(norm="last"))
    assert FusionPlan(**contents(plan)) == plan
