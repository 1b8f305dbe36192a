"""One schema for all results: the recorded files fit it; what does not follow from its samples is refused. Samples,
their intervals, and runs of many parts: kept one by one, continued, out of time, with one that fails."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from bench.record import RESULTS, VERSION, Measurement, Record, Session, measure, median, ratio

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
    assert " /" not in found.command, "a path of somebody's machine"


def test_a_command_says_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, elsewhere = RESULTS.parents[1] / "a" / "b.gguf", Path.home() / "c.gguf"
    monkeypatch.setattr("sys.argv", ["x", "--gguf", str(inside), str(elsewhere), "d/e", "--only=f"])
    assert a_record().command.partition(" --gguf ")[2] == "a/b.gguf c.gguf d/e --only=f"


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


# --- samples and intervals ----------------------------------------------------------------------------


def test_a_ratio_is_of_rounds_not_of_means() -> None:
    drift = [1.0, 2.0, 4.0, 8.0] * 5  # a machine that gets slower: the same for both
    found = ratio([2 * one for one in drift], drift)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(200):
        slow, fast = ([draw.lognormvariate(mean, 0.1) for _ in range(30)] for mean in (0.2, 0.0))
        found = ratio(slow, fast, draws=400)
        hits += found.low <= 1.2214 <= found.high
    assert 0.89 <= hits / 200 <= 0.98


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_a_median_lies_in_its_interval() -> None:
    found = median([5.0, 1.0, 2.0, 3.0, 4.0])
    assert found.value == 3.0 and 1.0 <= found.low < 3.0 < found.high <= 5.0


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    calls: list[int] = []
    before = torch.get_num_threads()
    (found,) = measure({"a": lambda: calls.append(torch.get_num_threads())}, rounds=3, threads=1).values()
    assert len(calls) > 1000 and max(found) < 1e-4
    assert set(calls) == {1} and torch.get_num_threads() == before


# --- runs of many parts -------------------------------------------------------------------------------


def part(tokens: int) -> Measurement:
    return Measurement.of({"tokens": tokens}, {"a": [1.0, 2.0]})


def test_parts_are_written_one_by_one_and_not_done_again(tmp_path: Path) -> None:
    path, done = tmp_path / "some.json", []

    def measure(tokens: int) -> Measurement:
        done.append(tokens)
        return part(tokens)

    with Session("some", seconds=60, path=path) as session:
        session.do({"tokens": 1}, lambda: measure(1))
        assert Record.read(path).measurements == (part(1),) and not Record.read(path).complete, "it may yet be stopped"
        session.do({"tokens": 1}, lambda: measure(1))
    with Session("some", seconds=60, path=path, fresh=False) as session:
        for tokens in (1, 4):
            session.do({"tokens": tokens}, lambda tokens=tokens: measure(tokens))
    assert done == [1, 4] and len(Record.read(path).measurements) == 2 and Record.read(path).complete
    with Session("some", seconds=60, path=path):
        pass
    assert not Record.read(path).measurements


def test_results_of_another_machine_are_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.json"
    record = Record.of("some", measurements=(part(1),))
    machine = record.machine.model_copy(update={"processor": "another"})
    record.model_copy(update={"machine": machine}).write(path)
    with Session("some", seconds=60, path=path, fresh=False) as session:
        assert not session.measurements
    assert "another machine" in capsys.readouterr().err


def test_what_has_no_time_is_named(tmp_path: Path) -> None:
    with Session("some", seconds=60, path=tmp_path / "some.json") as session:
        session.do({"tokens": 1}, lambda: part(1), needs=61)
    found = Record.read(tmp_path / "some.json")
    assert found.left_out == ("tokens 1",) and not found.complete and not found.measurements


def test_a_part_that_fails_costs_neither_the_others_nor_the_error(tmp_path: Path) -> None:
    def fail() -> Measurement:
        raise RuntimeError("out of memory")

    with (
        pytest.raises(SystemExit, match="tokens 1"),
        Session("some", seconds=60, path=tmp_path / "some.json") as session,
    ):
        session.do({"tokens": 1}, fail)
        session.do({"tokens": 4}, lambda: part(4))
    found = Record.read(tmp_path / "some.json")
    assert found.results["failed"] == {"tokens 1": "RuntimeError: out of memory"}
    assert [one.place["tokens"] for one in found.measurements] == [4] and not found.complete
