"""The one table writer, the one plot helper, and sections of a page: one is replaced, the others stay."""

from __future__ import annotations

from pathlib import Path

from bench.record import Interval, Measurement
from bench.show import bytes_, columns, draw_lines, new_figure, put_section, ratio_table, save, seconds, table, times


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


def test_a_table_by_columns_shows_intervals_and_dashes() -> None:
    rows = [{"a": {"loss": {"value": 1.0, "low": 0.5, "high": None}}, "n": 3}, {"a": None, "n": 4}]
    lines = columns(rows, [("n", "n"), ("loss", "a.loss"), ("loss", lambda row: row["n"] + 1)]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["n", "loss", "loss"] and cells[2:] == [["3", "1.000 [0.500, -]", "4"], ["4", "-", "5"]]


def test_the_same_plot_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        figure, axes = new_figure(x="tokens", y="gain")
        draw_lines(axes, {"fused": [(1, 1.2), (16, Interval(value=1.1, low=1.0, high=1.3))]})
        save(figure, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_sections_are_added_and_replaced_alone(tmp_path: Path) -> None:
    page = put_section(tmp_path / "page.md", "one", "# One\nfirst\n")
    put_section(page, "two", "## Two")
    assert (
        page.read_text()
        == "<!-- one -->\n# One\nfirst\n<!-- end of one -->\n\n<!-- two -->\n## Two\n<!-- end of two -->\n"
    )
    put_section(page, "one", "# One\nsecond")
    assert "second" in page.read_text() and "first" not in page.read_text() and page.read_text().count("## Two") == 1
    once = page.read_text()
    put_section(page, "one", "# One\nsecond")
    assert page.read_text() == once
