"""One schema for all results: the recorded files fit it; what does not follow from its samples is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bench.record import RESULTS, VERSION, Measurement, Record

FILES = sorted(RESULTS.glob("*.json"))
SAMPLES = {"slow": [2.0, 2.2, 2.4], "fast": [1.0, 1.1, 1.2], "again": [1.01, 1.09, 1.2]}


def a_record() -> Record:
    cell = Measurement.of({"tokens": 1}, SAMPLES, [("slow", "fast"), ("fast", "again")], facts={"bytes": 12})
    return Record.of("some", measurements=[cell], results={"share": 0.5})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_file_fits_the_schema(path: Path) -> None:
    found = Record.read(path)
    assert found.version == VERSION and found.benchmark == path.stem
    assert found.measurements or found.results
    assert found.command.startswith("python -m bench.") and found.commit


def test_there_are_recorded_files() -> None:
    assert len(FILES) >= 9


def test_a_measurement_says_what_its_samples_say() -> None:
    (cell,) = a_record().measurements
    assert cell.ratios["slow/fast"].value == 2.0
    assert cell.ratios["fast/again"].low < 1.0 < cell.ratios["fast/again"].high
    assert cell.medians["slow"].value == 2.2 and cell.medians["slow"].low == 2.0


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    written = a_record()
    path = written.write(tmp_path / "some.json")
    assert Record.read(path) == written
    assert '"slow": [2.0, 2.2, 2.4]' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


CHANGES: dict[str, tuple[list[Any], Any, str]] = {
    "a sample": (["measurements", 0, "samples", "fast", 2], 5.0, "ratio slow/fast is 2.0 in the file"),
    "a median": (["measurements", 0, "medians", "slow", "value"], 2.3, "median of slow is 2.3 in the file, 2.2"),
    "a ratio": (["measurements", 0, "ratios", "slow/fast", "value"], 2.1, "ratio slow/fast is 2.1 in the file, 2.0"),
    "a stranger's ratio": (
        ["measurements", 0, "ratios", "slow/other"],
        {"value": 1, "low": 1, "high": 1},
        "slow/other",
    ),
    "another version": (["version"], 1, "Input should be 2"),
    "an unknown field": (["comment"], "hello", "Extra inputs are not permitted"),
    "no number": (["measurements", 0, "samples", "fast", 0], float("nan"), "finite"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused(name: str, tmp_path: Path) -> None:
    place, value, words = CHANGES[name]
    document = json.loads(a_record().write(tmp_path / "some.json").read_text())
    inner = document
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    (tmp_path / "some.json").write_text(json.dumps(document))
    with pytest.raises(ValidationError, match=words):
        Record.read(tmp_path / "some.json")
