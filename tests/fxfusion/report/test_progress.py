"""progress: a bar on a terminal, lines at a distance elsewhere, or nothing; on the error stream alone."""

from __future__ import annotations

import io
import sys

import pytest

from fxfusion.report import progress
from fxfusion.report.progress import each, reporting, whole


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_said_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(False, "words", 3) as advance:
        advance()
        advance(2, "more")
    items = [1, 2]
    assert each(items, False, "words") is items and capsys.readouterr() == ("", "")


def test_lines_come_every_30_seconds_with_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(True, "words", 40, done=10) as advance:
        for seconds in (10, 19, 1, 20, 20):
            clock[0] += seconds
            advance(5, "loss 3")
    found = capsys.readouterr()
    assert found.out == "" and found.err.splitlines() == [
        "words: 25/40 (62 %), 0:00:30 left, loss 3",
        "words: 35/40 (87 %), 0:00:14 left, loss 3",
        "words: 35/40 (87 %) after 0:01:10, loss 3",
    ]


def test_bytes_and_unknown_totals(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for total, is_bytes in ((2_000_000, True), (7, True), (None, False), (0, False)):
        with reporting(True, "words", total, is_bytes=is_bytes) as advance:
            clock[0] += 60
            advance(total or 0)
    assert capsys.readouterr().err.splitlines()[1::2] == [
        "words: 2.0/2.0 MB (100 %) after 0:01:00",
        "words: 7/7 bytes (100 %) after 0:01:00",
        "words: 0 after 0:01:00",
        "words: 0/0 after 0:01:00",
    ]


def test_a_whole_of_parts_says_how_far_all_of_it_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """The second part goes as the first one went: twice as long as was estimated."""
    with whole({"choose": 30.0, "refit": 60.0}) as begin:
        begin("choose")
        clock[0] += 60
        begin("refit")
        with reporting(True, "layers", 4) as advance:
            clock[0] += 60
            advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "(1 of 2) choose; in all 0 %, 0:01:30 left",
        "(2 of 2) refit; in all 33 %, 0:02:00 left",
        "layers: 2/4 (50 %), 0:01:00 left; in all 67 %, 0:01:00 left",
        "layers: 2/4 (50 %) after 0:01:00; in all 67 %, 0:01:00 left",
    ]
    with reporting(True, "alone", 1) as advance:
        advance()
    assert capsys.readouterr().err == "alone: 1/1 (100 %) after 0:00:00\n"


def test_a_part_that_takes_longer_than_it_should_is_not_over(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with whole({"choose": 10.0}) as begin:
        begin("choose")
        with reporting(True, "windows", 2) as advance:
            clock[0] += 100
            advance()
    assert "in all 95 %, 0:00:05 left" in capsys.readouterr().err


def test_an_error_ends_it_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), reporting(True, "words", 3) as advance:
        advance()
        raise KeyError
    assert "words: 1/3 (33 %)" in capsys.readouterr().err


@pytest.mark.parametrize("items", [[1, 2, 3], iter([1, 2, 3])], ids=["sized", "not sized"])
def test_items_are_passed_on(items: object, capsys: pytest.CaptureFixture[str]) -> None:
    count = "3/3 (100 %)" if isinstance(items, list) else "3 after"
    assert list(each(items, True, "words")) == [1, 2, 3]  # type: ignore[call-overload]
    assert f"words: {count}" in capsys.readouterr().err


def test_a_terminal_gets_one_display_for_jobs_inside_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with reporting(True, "outer [job]", 2) as outer:
        display = progress._bars
        with reporting(True, "inner", 5, done=1) as inner:
            inner(4, "loss 3")
            assert progress._bars is display
            assert [(task.description, task.completed, task.fields["count"]) for task in display.tasks] == [
                ("outer [job]", 0, "0/2"),
                ("inner", 5, "5/5"),
            ]
        outer(2)
    assert progress._bars is None and "outer [job]" in shown.getvalue() and "2/2" in shown.getvalue()
