"""A benchmark of many parts: kept one by one, continued, out of time, with one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.budget import Session
from bench.record import Measurement, Record


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
