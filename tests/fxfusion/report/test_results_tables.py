"""Rows of the tables: numbers as text, in the places they are read at."""

from __future__ import annotations

import pytest

from fxfusion.report import results_tables as tables
from fxfusion.report.results import (
    Entry,
    Interval,
    Layer,
    Matrix,
    PlanFacts,
    ProbeRow,
    QualityRow,
    Sample,
    SpeedRow,
    SweepPoint,
)
from fxfusion.report.results_tables import Cell


@pytest.mark.parametrize(
    ("found", "value", "interval"),
    [
        (Interval(1.23456, 1.2, 1.3), "1.235", "[1.200, 1.300]"),
        (Interval(1234.5, 0.0, None), "1,234.500", "[0.000, ∞]"),
        (Interval(1.0, None, 2.0), "1.000", "[-∞, 2.000]"),
        (Interval(1.0), "1.000", ""),
        (Interval(None, 1.0, 2.0), "not finite", ""),
        (None, "", ""),
    ],
)
def test_cell(found: Interval | None, value: str, interval: str) -> None:
    made = tables.cell(found, 3)
    assert (made.value, made.interval) == (value, interval)


def test_a_share_is_shown_in_percent_and_sorted_as_it_is() -> None:
    assert tables.cell(Interval(0.973, 0.97, 0.98), 1, 100) == Cell("97.3", "[97.0, 98.0]", 0.973)


def test_intervals_of_a_column_get_the_same_room() -> None:
    rows = tables.aligned([[Cell("1", "[1, 2]"), Cell("2")], [Cell("10", "[10, 20]"), Cell("3")]])
    assert [[found.room for found in row] for row in rows] == [[6.0, 0.0], [6.0, 0.0]]
    assert tables.aligned([]) == []


@pytest.mark.parametrize(("layers", "text"), [((4, 5, 6, 9), "4-6, 9"), ((), "none"), ((3,), "3")])
def test_numbers(layers: tuple[int, ...], text: str) -> None:
    assert tables.numbers(layers) == text


def test_a_layer_in_words() -> None:
    layer = Layer(
        number=3, mixer="dropped", width=640, group=1, score=Interval(0.1, 0.05, 0.2), cosine=0.98, ratio=0.25
    )
    assert tables.layer_title(layer).splitlines() == [
        "layer 3",
        "attention dropped",
        "attention score 0.1000 [0.0500, 0.2000]",
        "FFN of width 640",
        "fused, group 1",
        "cos(X, f(X)) 0.9800",
        "‖h‖ / ‖X‖ 0.2500",
    ]
    assert tables.layer_title(Layer(number=0, mixer="none")).splitlines() == ["layer 0", "no attention", "no FFN"]


def test_a_group_is_as_wide_as_its_layers_where_all_are_known() -> None:
    plan = PlanFacts(groups=((1, 2), (5, 6), ("a.mlp", "b.mlp")), mixers=("hoist", "none", "none"))
    rows = tables.plan_groups(plan, [Layer(number=1, width=1000), Layer(number=2, width=500), Layer(number=5, width=1)])
    assert [(row.members, row.count, row.width, row.attention) for row in rows] == [
        ("1-2", 2, "1,500", "goes first, one after another"),
        ("5-6", 2, "", ""),
        ("a.mlp, b.mlp", 2, "", ""),
    ]


def test_only_measured_qualities_get_a_column() -> None:
    found = tables.quality([QualityRow(name="a", perplexity=Interval(20.0, 19.0, 21.0)), QualityRow(name="b")])
    assert found.heads == ("perplexity",)
    assert [row.cells[0].value for row in found.rows] == ["20.00", ""]


def test_probes_are_in_percent_and_empty_where_nothing_counts() -> None:
    found = tables.probes([ProbeRow(name="fused", solved=(("copy", 0.875), ("add", None)))])
    assert found.heads == ("copy, %", "add, %")
    assert [cell.value for cell in found.rows[0].cells] == ["88", ""]


def test_a_comparison_has_the_columns_that_were_measured_and_the_rows_that_could_be_had() -> None:
    entry = Entry(method="hoist", depth=2, refitted=True, ffns=2, kl=Interval(0.25, 0.2, 0.3))
    found = tables.comparison([entry, Entry(method="pairs", depth=1, problem="too few layers")])
    assert found.heads == ("FFN depth", "KL")
    (row,) = found.rows
    assert row.name == "hoist + refit" and [cell.value for cell in row.cells] == ["2", "0.2500"]


def test_each_speed_has_its_control() -> None:
    found = tables.speed([SpeedRow(name="decode", ratio=Interval(1.5, 1.4, 1.6))])
    assert [one.value for one in found.rows[0].cells] == ["1.500", ""]


def test_groups_say_their_largest_dependency() -> None:
    values = ((0, 0.1, 0.2, 0.9), (0, 0, 0.4, 0.8), (0, 0, 0, 0.7), (0, 0, 0, 0))
    plan = PlanFacts(groups=((3, 4, 5), ("a.mlp", "b.mlp"), (6,)))
    (found,) = tables.inside_groups(Matrix(layers=(3, 4, 5, 6), values=values), plan)  # one has two layers of it
    assert (found.group, found.mean, found.largest, found.where) == (0, "0.233", "0.4", "4 → 5")
    assert tables.inside_groups(Matrix(layers=(3, 4), values=((0, 1), (0, 0))), None) == []


def test_rows_without_values_are_named() -> None:
    matrix = Matrix(layers=(3, 4), values=((0.0, None), (0.0, 0.0)))
    (found,) = tables.inside_groups(matrix, PlanFacts(groups=((3, 4),)))
    assert (found.mean, found.largest, found.where) == ("", "not measured", "") and tables.unmeasured(matrix) == "3"
    assert tables.unmeasured(Matrix(layers=(3, 4), values=((None, 0.1), (None, None)))) == ""


def test_a_plan_of_a_sweep_in_words() -> None:
    found = tables.sweep([SweepPoint(label="six", depth=6, dropped=2, fused_bytes=2**21, loss=Interval(3.0, 2.9, 3.1))])
    assert found.heads == ("depth", "loss", "attention dropped", "fused MiB")
    words = "six\ndepth 6\nloss 3.000 [2.900, 3.100]\nattention dropped 2\nfused MiB 2.0"
    assert tables.row_title(found.rows[0], found.heads) == words


def test_texts_are_cut_where_they_part() -> None:
    found = tables.texts(Sample(prompt="p", reference="the same end", text="the same start"))
    assert (found.common, found.reference, found.text) == ("the same ", "end", "start")
