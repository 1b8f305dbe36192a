from __future__ import annotations

import csv
import errno
import json
from pathlib import Path

import pytest

from fxfusion.files import RECORD
from tests.fxfusion.cli.conftest import SMALL, Run


@pytest.fixture
def args(model: Path, text: Path, results: Path) -> list[object]:
    return ["sweep", model, "--text", text, "--results", results, *SMALL]


def test_every_depth_is_in_the_table_the_plot_and_the_json(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args, "--drops", "0,3", "--json")
    assert ran.code == 0, ran.err
    points = ran.json["points"]
    assert {len(point["dropped_attention"]) for point in points} == {0, 3}
    assert {point["depth"] for point in points} == {1, 2, 3} and any(point["on_front"] for point in points)
    with (results / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["depth"]) for row in rows] == [point["depth"] for point in points]
    assert json.loads((results / "sweep.json").read_text())["points"] == points
    assert "<svg" in (results / "sweep.svg").read_text()
    assert [file.name for file in results.iterdir() if file.name.startswith(".")] == [RECORD]


@pytest.mark.slow
def test_a_second_sweep_measures_only_what_is_new_and_shows_the_front(
    run: Run, args: list[object], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfusion.analysis import meter

    first = run(*args, "--drops", "2")
    assert first.code == 0 and " *" in first.out and "sweep.csv" in first.out
    monkeypatch.setattr(meter, "evaluate", lambda *_, **__: pytest.fail("a plan was measured again"))
    assert run(*args, "--drops", "2").out == first.out
    with pytest.raises(pytest.fail.Exception):
        run(*args, "--drops", "3")


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_loses_no_measurement(
    run: Run, args: list[object], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fxfusion.planning.sweep.csv.writer", full)
    ran = run(*args, "--drops", "2")
    assert ran.code == 1 and "sweep.csv: cannot be written" in ran.error and "No space left" in ran.error
    assert json.loads((results / "plans.json").read_text())["plans"] and not (results / "sweep.csv").exists()
    monkeypatch.undo()
    assert run(*args, "--drops", "2").code == 0


@pytest.mark.parametrize(("drops", "named"), [("two", "--drops"), ("9", "9 attention layers"), ("2-0", "backwards")])
def test_wrong_numbers_are_named(run: Run, args: list[object], drops: str, named: str) -> None:
    ran = run(*args, "--drops", drops)
    assert ran.code == 2 and named in ran.error and ran.out == ""


def test_a_setting_without_hardware_is_named(run: Run, args: list[object]) -> None:
    ran = run(*args, "--tp", 8)
    assert ran.code == 2 and "name the --hardware" in ran.error
