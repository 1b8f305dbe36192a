"""The one table writer, and the one plot helper."""

from __future__ import annotations

from pathlib import Path

from bench.plots import draw_lines, new_figure, save
from bench.record import Measurement
from bench.tables import bytes_, ratio_table, seconds, table, times
from bench.timing import Interval


def test_numbers_stay_as_they_were_written() -> None:
    assert table([("1.10x", "007", None)], ("a", "b", "c"), markdown=True).splitlines()[-1].split("|")[1:-1] == [
        " 1.10x ",
        " 007 ",
        "     ",
    ]


def test_units() -> None:
    assert [seconds(value) for value in (2.5, 0.0123, 4.2e-6, 3e-9)] == ["2.5 s", "12.3 ms", "4.2 us", "3 ns"]
    assert [bytes_(value) for value in (3 * 2**30, 1.5 * 2**20, 2048, 7)] == ["3 GiB", "1.5 MiB", "2 KiB", "7 B"]
    assert times(Interval(value=1.2345, low=1.2, high=1.3)) == "1.23x [1.20, 1.30]"


def test_a_measurement_is_one_row() -> None:
    cells = [Measurement.of({"tokens": n}, {"a": [2.0, 2.0], "b": [1.0, 1.0]}, [("a", "b")]) for n in (1, 16)]
    lines = ratio_table(cells, [("a/b", "gain"), ("a/c", "not measured")]).splitlines()
    assert lines[0].split() == ["tokens", "gain", "not", "measured"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "16"] and "2.00x [2.00, 2.00]" in lines[2]


def test_the_same_plot_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        figure, axes = new_figure(x="tokens", y="gain")
        draw_lines(axes, {"fused": [(1, 1.2), (16, Interval(value=1.1, low=1.0, high=1.3))]}, powers_of_two=True)
        save(figure, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
