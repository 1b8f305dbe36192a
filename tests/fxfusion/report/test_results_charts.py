"""Geometry of the charts: values stand where they belong, colours rise, and many layers stay small."""

from __future__ import annotations

import re

import pytest

from fxfusion.report.charts.heat_map import colour, colour_scale, colour_step, heat_map, measured
from fxfusion.report.charts.layer_map import layer_map
from fxfusion.report.charts.scale import Scale, layer_ticks, number, runs
from fxfusion.report.charts.scatter import panels, strip
from fxfusion.report.results import Interval, Layer, Matrix, PlanFacts, SweepPoint
from tests.fxfusion.report.results_samples import UNMEASURED, everything, large


def cells(path: str) -> set[tuple[int, int]]:
    """The cells (column, row) that a path of the heat map covers."""
    found = re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path)
    assert "".join(f"M{x} {y}h{n}v1h-{n}z" for x, y, n in found) == path
    return {(int(x) + step, int(y)) for x, y, n in found for step in range(int(n))}


# --- axes --------------------------------------------------------------------------------------------------


def test_a_linear_scale_has_room_at_its_ends() -> None:
    scale = Scale.around([2.0, 4.0], margin=0.1)
    assert (scale.low, scale.high, scale.log) == (1.8, 4.2, False)
    assert [scale.share(value) for value in (1.8, 3.0, 4.2, 99.0, -9.0)] == [0.0, 50.0, 100.0, 100.0, 0.0]


def test_values_far_apart_get_a_logarithmic_scale() -> None:
    scale = Scale.around([1.0, 100.0], margin=0)
    assert scale.log and scale.share(10.0) == 50.0 and scale.share(0.0) == 0.0
    assert not Scale.around([0.0, 100.0]).log and not Scale.around([1.0, 19.0]).log


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_single_value_stands_in_the_middle(value: float) -> None:
    scale = Scale.around([value])
    assert scale.share(value) == 50.0 and scale.ticks()


@pytest.mark.parametrize(
    ("low", "high", "log", "labels"),
    [
        (0.9, 4.1, False, ["1", "1.5", "2", "2.5", "3", "3.5", "4"]),
        (11, 24, False, ["12", "14", "16", "18", "20", "22", "24"]),
        (18, 110, True, ["20", "50", "100"]),
        (1e-5, 1e-1, True, ["1e-05", "0.0001", "0.001", "0.01", "0.1"]),
        (3, 4, True, ["3", "3.2", "3.4", "3.6", "3.8", "4"]),
        (-1e-3, 1e-3, False, ["-0.001", "-0.0005", "0", "0.0005", "0.001"]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, log: bool, labels: list[str]) -> None:
    assert [tick.label for tick in Scale(low, high, log).ticks()] == labels


@pytest.mark.parametrize("exponent", range(-6, 9))
@pytest.mark.parametrize("span", [1.0, 1.7, 2.3, 4.9, 7.7, 9.9])
def test_there_are_three_to_nine_ticks_on_any_linear_axis(exponent: int, span: float) -> None:
    ticks = Scale(0.37 * 10.0**exponent, (0.37 + span) * 10.0**exponent).ticks()
    assert 3 <= len(ticks) <= 9 and len({tick.label for tick in ticks}) == len(ticks)
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)


def test_whole_numbers_get_whole_ticks() -> None:
    assert [tick.label for tick in Scale(11.8, 14.2).ticks(least=1.0)] == ["12", "13", "14"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12288, "12,288"), (0.012345, "0.0123"), (1.0, "1"), (-0.5, "-0.5"), (1.2e-7, "1.2e-07")],
)
def test_number(value: float, text: str) -> None:
    assert number(value, 5 if value == 12288 else 3) == text


def test_runs() -> None:
    assert runs([7, 3, 4, 5, 9, 8, 3]) == [(3, 3), (7, 3)] and runs([]) == []


@pytest.mark.parametrize(("count", "step"), [(12, 1), (13, 1), (14, 2), (80, 10), (126, 10), (162, 20)])
def test_layer_numbers_are_thinned_out(count: int, step: int) -> None:
    ticks = layer_ticks(range(count))
    assert [tick.label for tick in ticks] == [str(layer) for layer in range(0, count, step)]
    assert ticks[0].at == pytest.approx(50 / count, abs=1e-3)


# --- heat map ----------------------------------------------------------------------------------------------


def test_each_value_has_the_colour_of_its_power_of_two() -> None:
    assert [colour_step(2.0**power) for power in (-12, -9, -8.75, -5, -1, 0)] == [0, 0, 1, 16, 32, 32]
    assert colour_step(0.0) == 0
    assert (colour(0), colour(16), colour(32)) == ("#440154", "#21918c", "#fde725")  # viridis at 0, 1/2 and 1


def test_the_colours_get_lighter_from_step_to_step() -> None:
    colours, ticks = colour_scale()
    rgb = [[int(one[at : at + 2], 16) for at in (1, 3, 5)] for one in colours]
    lightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in rgb]
    assert lightness == sorted(lightness) and len(set(colours)) == 33
    assert [(tick.at, tick.label) for tick in (ticks[0], ticks[4], ticks[-1])] == [(0, "-9"), (50, "-5"), (100, "-1")]


def test_every_measured_cell_is_filled_once_with_its_colour() -> None:
    matrix = large().matrix
    assert matrix is not None
    found = heat_map(matrix, None)
    filled = [(cell, tint) for tint, path in found.fills for cell in cells(path)]
    expected = {(column, row): colour(colour_step(value)) for row, column, value in measured(matrix)}
    assert len(filled) == len(expected) == 126 * 125 / 2 - (125 - UNMEASURED)
    assert found.missing == (UNMEASURED,)
    assert dict(filled) == expected
    assert sum(len(path) for _, path in found.fills) < 150_000


def test_neighbours_of_one_colour_share_a_rectangle() -> None:
    matrix = Matrix(layers=(3, 4, 5, 6), values=((0, 0.3, 0.3, 0.3), (0, 0, 0.3, 0.01), (0, 0, 0, 0), (0,) * 4))
    assert dict(heat_map(matrix, None).fills) == {
        colour(colour_step(0.3)): "M1 0h3v1h-3zM2 1h1v1h-1z",
        colour(colour_step(0.01)): "M3 1h1v1h-1z",
        colour(0): "M3 2h1v1h-1z",
    }


def test_groups_are_outlined_and_say_their_largest_dependency() -> None:
    values = ((0, 0.1, 0.2, 0.9), (0, 0, 0.4, 0.8), (0, 0, 0, 0.7), (0, 0, 0, 0))
    plan = PlanFacts(groups=((3, 4, 5), ("a.mlp", "b.mlp")), dropped_attention=(4, 5, 60))
    found = heat_map(Matrix(layers=(3, 4, 5, 6), values=values), plan)
    (outline,) = found.outlines  # the other group has no layer numbers
    assert (outline.first, outline.size, outline.largest) == (0, 3, (4, 5, 0.4))
    assert outline.mean == pytest.approx(0.7 / 3)
    assert found.strips == ((1, 2),)


def test_rows_without_values_are_named() -> None:
    matrix = Matrix(layers=(3, 4), values=((0.0, None), (0.0, 0.0)))
    found = heat_map(matrix, PlanFacts(groups=((3, 4),)))
    assert found.missing == (3,) and found.fills == ()
    assert (found.outlines[0].largest, found.outlines[0].mean) == (None, None)


# --- layer map ---------------------------------------------------------------------------------------------


def test_layers_stand_in_order_with_their_groups() -> None:
    layers = (
        Layer(number=0, width=100),
        Layer(number=1, mixer="dropped", width=200, group=0),
        Layer(number=2, mixer="none", width=50, group=0),
        Layer(number=3, width=0, mixer="none"),
    )
    found = layer_map(layers, "loss")
    assert (found.kept.count("M"), found.dropped.count("M")) == (1, 1)
    assert found.dropped.startswith("M1.")
    assert dict(found.bars)[None] == "M0.08 100v-50.0h.84v50.0z"
    assert re.findall(r"M(\d)\.08 100v-([\d.]+)", dict(found.bars)[0]) == [("1", "100.0"), ("2", "25.0")]
    (bracket,) = found.brackets
    assert (bracket.left, bracket.width, bracket.label) == (25.0, 50.0, "group 0")
    assert found.curves == () and found.widest == 200


def test_layers_without_any_ffn_have_no_bars() -> None:
    assert layer_map((Layer(number=0), Layer(number=1)), "").bars == ()


def test_a_narrow_group_has_a_short_label() -> None:
    results = large()
    assert [one.label for one in layer_map(results.layers, "").brackets] == ["0", "group 1", "group 2"]


def test_a_curve_goes_through_its_values_and_skips_gaps() -> None:
    scores = (Interval(1.0, 0.5, 1.5), None, Interval(-0.5), Interval(None))
    found = layer_map([Layer(number=at, score=score) for at, score in enumerate(scores)], "kl")
    (curve,) = found.curves
    assert (curve.label, curve.low, curve.high) == ("attention score (kl)", "-0.5", "1.5")
    assert curve.dots == "M0.5 25h0M2.5 100h0" and curve.whiskers == "M0.5 50V0" and curve.line == ""
    assert curve.zero == 75.0


def test_the_axis_of_scores_reaches_zero() -> None:
    found = layer_map([Layer(number=at, score=Interval(score)) for at, score in enumerate((0.2, 8.0))], "kl")
    assert (found.curves[0].low, found.curves[0].zero, found.curves[0].label) == ("0", 100.0, "attention score (kl)")


# --- points and whiskers -----------------------------------------------------------------------------------


def point(depth: int, perplexity: float | None, front: bool, size: int | None = None) -> SweepPoint:
    found = None if perplexity is None else Interval(perplexity, perplexity - 1, perplexity + 1)
    return SweepPoint(label="", depth=depth, perplexity=found, front=front, fused_bytes=size)


def test_the_front_goes_through_its_points_from_left_to_right() -> None:
    (panel,) = panels([point(12, 20.0, True), point(10, 25.0, True), point(11, 30.0, False), point(9, None, False)])
    assert [one.index for one in panel.points] == [0, 1, 2]
    places = {one.index: f"{one.left:g} {one.top:g}" for one in panel.points}
    assert panel.front == f"M{places[1]}L{places[0]}"
    assert panel.points[0].left > panel.points[1].left and panel.points[0].top > panel.points[1].top
    assert [tick.label for tick in panel.across_ticks] == ["10", "11", "12"]
    assert panel.whiskers.count("M") == 3


def test_bytes_get_a_plot_of_their_own_in_a_readable_unit() -> None:
    first, second = panels([point(12, 20.0, True, 0), point(10, 25.0, True, 3 * 2**30)])
    assert (first.across, second.across) == ("FFN depth", "fused weights (GiB)")
    assert second.front == ""  # more bytes at a higher perplexity: no front


def test_a_sweep_without_quality_has_no_plot() -> None:
    assert panels([point(12, None, False, 5)]) == [] and panels([]) == []


def test_the_loss_is_plotted_where_there_is_no_perplexity() -> None:
    (panel,) = panels([SweepPoint(label="", depth=3, loss=Interval(2.0))])
    assert panel.up == "loss (nats per token)"


def test_whiskers_share_an_axis_and_open_ends_reach_its_end() -> None:
    found = strip([Interval(1.0, 0.5, 1.5), Interval(2.0, 1.75, None), Interval(3.0), Interval(None), None], 1.0)
    assert found is not None
    closed, open_, exact, broken, missing = found.rows
    assert closed is not None and open_ is not None and exact is not None
    assert closed.left < closed.at < closed.left + closed.width and closed.at == found.anchor
    assert open_.left + open_.width == 100.0 and open_.left > closed.left
    assert exact.width == 0 and broken is None and missing is None
    assert strip([None, Interval(None)]) is None


def test_the_sample_has_every_chart() -> None:
    results = everything()
    assert len(layer_map(results.layers, "loss").curves) == 3 and len(panels(results.sweep)) == 2
