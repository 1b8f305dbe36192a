"""The charts: values stand where they belong, in the colours of the page, and the same data give the same picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import pytest

from fxfusion.report import GraphReport
from fxfusion.report.charts import heat_map, layer_map, measures
from fxfusion.report.charts.figure import (
    COLOURS,
    Chart,
    hue,
    ink,
    inline,
    layer_ticks,
    new_figure,
    plain_numbers,
    style,
)
from fxfusion.report.charts.layer_map import Column, Curve, columns_of, curves_of, legend_of, map_of_layers
from fxfusion.report.results import Interval, Layer, Matrix, PlanFacts, SweepPoint
from tests.fxfusion.report.results_samples import UNMEASURED, everything, large
from tests.fxfusion.report.test_html import ffn, graph_report, mixer


@pytest.fixture(autouse=True)
def styled() -> Iterator[None]:
    with style():
        yield


def labels(axis: Any) -> list[str]:
    """Numbers along an axis, as far as they are seen."""
    low, high = sorted(axis.get_view_interval())
    places = axis.get_majorticklocs()
    texts = axis.get_major_formatter().format_ticks(places)
    return [text for place, text in zip(places, texts, strict=True) if low <= place <= high]


# --- figures ------------------------------------------------------------------------------------------


def chart_of(words: str) -> Chart:
    figure = new_figure(200, 100)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "o", color=hue(0))
    axes.set_xlabel(words)
    return inline(figure, "name", words, words, over=[axes])


def test_a_chart_has_a_title_and_a_text_and_the_colours_of_the_page() -> None:
    svg = chart_of("some words").svg
    assert svg.startswith('<svg viewBox="0 0 200 100" role="img"><title>some words</title><desc>some words</desc>')
    assert "var(--h0)" in svg and "var(--soft)" in svg
    assert not re.search("|".join(light for light, _ in COLOURS.values()), svg)
    assert not re.search(r"https?:|<style|font-family|<g id=", svg)


def test_words_stay_words() -> None:
    svg = chart_of("$x^$ <b> & 注意").svg
    assert svg.count("$x^$ &lt;b&gt; &amp; 注意") == 3 and "<b>" not in svg


def test_the_same_data_give_the_same_chart() -> None:
    assert chart_of("a") == chart_of("a") != chart_of("b")


def test_no_two_colours_are_one_in_a_figure() -> None:
    """Else the page could not tell which variable is meant."""
    lights = [light for light, _ in COLOURS.values()]
    assert len(set(lights)) == len(lights) and hue(8) == hue(0) != hue(1)


def test_the_area_is_where_the_data_are() -> None:
    figure = new_figure(400, 200)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.25, 0.5, 0.5, 0.4))
    assert inline(figure, "name", "", "", over=[axes]).area == pytest.approx((25, 10, 50, 40))


@pytest.mark.parametrize(("count", "step"), [(12, 1), (20, 1), (21, 2), (80, 5), (126, 10), (162, 10)])
def test_layer_numbers_are_thinned_out(count: int, step: int) -> None:
    axes = new_figure(100, 100).subplots()
    axes.set_xlim(-0.5, count - 0.5)
    layer_ticks(axes.xaxis, range(count))
    assert labels(axes.xaxis) == [str(layer) for layer in range(0, count, step)]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_numbers_along_an_axis_are_few_and_written_out(scale: str) -> None:
    axes = new_figure(100, 100).subplots()
    axes.set_yscale(scale)
    axes.set_ylim(1000, 90_000)
    plain_numbers(axes.yaxis, 5)
    found = labels(axes.yaxis)
    assert 2 <= len(found) <= 6 and {"10,000", "20,000"} & {*found}


# --- heat map -----------------------------------------------------------------------------------------


def cells(matrix: Matrix, **more: Any) -> Any:
    return numpy.asarray(heat_map.draw(matrix, **more).axes[0].images[0].get_array())


def test_colours_follow_the_logarithm_and_get_lighter() -> None:
    powers = [-12, -9, -7, -5, -3, -1, 0]
    values = tuple(
        tuple(2.0**power if column > row else 0.0 for column, power in enumerate(powers)) for row in range(7)
    )
    (found,) = cells(Matrix(layers=tuple(range(7)), values=values))[:1]
    lightness = found[1:, :3] @ [0.2126, 0.7152, 0.0722]
    assert list(lightness[:-1]) == sorted(lightness[:-1]) and lightness[-1] == lightness[-2]  # beyond: the end's colour
    assert all(numpy.diff(lightness[:-1]) > 0.05)
    whole = cells(Matrix(layers=(0, 1, 2), values=((0.0, 2.0**-12, 2.0**-9), (0.0,) * 3, (0.0,) * 3)))
    assert (whole[0, 1] == whole[0, 2]).all() and (whole[0, 1] == whole[1, 2]).all()  # exactly 0: independent


def test_every_measured_cell_is_filled_and_no_other() -> None:
    matrix = large().matrix
    assert matrix is not None
    filled = cells(matrix)[..., 3] > 0
    expected = numpy.triu(numpy.ones((126, 126), dtype=bool), 1)
    expected[UNMEASURED] = False
    assert (filled == expected).all()


def test_layers_without_attention_are_marked_and_groups_outlined() -> None:
    values = ((0, 0.1, 0.2, 0.9), (0, 0, 0.4, 0.8), (0, 0, 0, 0.7), (0, 0, 0, 0))
    matrix = Matrix(layers=(3, 4, 5, 6), values=values, unit="ffn")
    groups = ((3, 4, 5), ("a.mlp", "b.mlp"))  # the other group has no layer numbers
    axes = heat_map.draw(matrix, groups, (4, 5, 60)).axes[0]
    marked = numpy.diagonal(cells(matrix, dropped=(4, 5, 60))[..., 3])
    assert list(marked) == [0, 1, 1, 0]
    boxes = [one for one in axes.patches if one.get_width() > 0]
    assert {(box.get_x(), box.get_y(), box.get_width()) for box in boxes} == {(-0.5, -0.5, 3)} and len(boxes) == 2
    assert axes.get_legend() is not None and heat_map.draw(matrix).axes[0].get_legend() is None
    assert labels(axes.xaxis) == ["3", "4", "5", "6"] and "FFN that is removed" in axes.get_ylabel()


def test_the_scale_says_its_ends() -> None:
    figure = heat_map.draw(Matrix(layers=(0, 1), values=((0.0, 0.1), (0.0, 0.0))))
    found = labels(figure.axes[1].yaxis)
    assert (found[0], found[-1], len(found)) == ("0.002 or less", "0.5 or more", 9)


def test_a_large_heat_map_is_small() -> None:
    matrix = large().matrix
    assert matrix is not None
    chart = heat_map.heat_map(matrix, PlanFacts(groups=((3, 4),)))
    assert len(chart.svg) < 120_000 and chart.svg.count("<image") == 2


# --- layer map ----------------------------------------------------------------------------------------


def boxes(axes: Any) -> dict[str, list[list[float]]]:
    """Left, bottom, right, top of the boxes by the colour that fills them; "" for none."""
    from matplotlib.colors import to_hex

    found = {}
    for patch in axes.patches:
        corners = patch.get_path().vertices.reshape(-1, 5, 2)[:, :4]
        colour = to_hex(patch.get_facecolor()) if patch.get_facecolor()[3] else ""
        found[colour] = numpy.concatenate([corners.min(1), corners.max(1)], axis=1).round(2).tolist()
    return found


def columns(layers: Sequence[Layer]) -> list[Column]:
    return [Column(label=str(one.number), mixer=one.mixer, width=one.width, group=one.group) for one in layers]


def test_layers_stand_in_order_with_their_groups() -> None:
    found = columns(
        (
            Layer(number=0, width=100),
            Layer(number=1, mixer="dropped", width=200, group=0),
            Layer(number=2, mixer="none", width=50, group=0),
            Layer(number=3, width=0, mixer="none"),
        )
    )
    mixers, ffns = layer_map.draw(found).axes
    assert {colour: [box[0] for box in at] for colour, at in boxes(mixers).items()} == {
        ink("edge"): [-0.36],
        "": [0.64],
    }
    assert boxes(ffns) == {
        ink("plain"): [[-0.42, 0, 0.42, 100]],
        hue(0): [[0.58, 0, 1.42, 200], [1.58, 0, 2.42, 50]],
    }
    (bracket,) = ffns.lines
    assert list(bracket.get_xdata()) == pytest.approx([0.58, 2.42]) and ffns.texts[0].get_text() == "group 0"
    assert labels(ffns.yaxis) == ["0", "200"] and labels(ffns.xaxis) == ["0", "1", "2", "3"]
    assert [name for name, _ in legend_of(found)] == ["kept", "dropped", "plain", "hue0"]


def test_layers_without_any_ffn_have_no_boxes() -> None:
    assert boxes(layer_map.draw(columns((Layer(number=0), Layer(number=1)))).axes[1]) == {}


def test_a_narrow_group_has_a_short_label() -> None:
    axes = layer_map.draw(columns(large().layers)).axes[1]
    assert [text.get_text() for text in axes.texts] == ["0", "group 1", "group 2"]


def test_a_curve_goes_through_its_values_and_skips_gaps() -> None:
    scores = (Interval(1.0, 0.5, 1.5), None, Interval(-0.5), Interval(None))
    layers = [Layer(number=at, score=score) for at, score in enumerate(scores)]
    (curve,) = curves_of(layers, "kl")
    axes = layer_map.draw(columns(layers), [curve]).axes[2]
    whisker, dots, zero = axes.lines
    assert axes.get_title("left").startswith("attention score (kl)")
    assert [*zip(dots.get_xdata(), dots.get_ydata(), strict=True)] == [(0, 1.0), (2, -0.5)]
    assert list(whisker.get_xdata())[:2] == [0, 0] and list(whisker.get_ydata())[:2] == [0.5, 1.5]
    assert dots.get_linestyle() == "None" and list(zero.get_ydata()) == [0, 0]


def test_the_axis_of_scores_reaches_zero_and_that_of_other_measures_need_not() -> None:
    values = [Interval(0.2), Interval(8.0)]
    layers = columns([Layer(number=0), Layer(number=1)])
    for from_zero in (True, False):
        axes = layer_map.draw(layers, [Curve(label="a", values=values, from_zero=from_zero)]).axes[2]
        assert (axes.get_ylim()[0] <= 0, axes.get_yscale()) == ((True, "linear") if from_zero else (False, "log"))
        assert axes.get_title("left") == ("a" if from_zero else "a, log scale")
        assert labels(axes.yaxis) and any(list(line.get_ydata()) == [0, 0] for line in axes.lines) == from_zero


def test_the_sample_has_every_curve_and_a_text_for_each_layer() -> None:
    results = everything()
    chart = map_of_layers(results.layers, "loss")
    assert len(curves_of(results.layers, "loss")) == 3 and len(chart.columns) == 12
    assert chart.columns[5].startswith("layer 5\nattention dropped\n")
    assert len(map_of_layers(large().layers, "loss").svg) < 100_000


def test_a_mixer_and_the_ffn_of_its_layer_share_a_column() -> None:
    found = columns_of(graph_report())
    assert [(one.label, one.mixer, one.width, one.group, one.refused) for one in found] == [
        ("0", "kept", 64, None, False),
        ("1", "none", 64, 0, False),
        ("2", "none", 192, 0, False),
        ("4", "none", 0, None, True),
    ]
    drawn = boxes(layer_map.draw(found).axes[1])
    assert [box[2] for box in drawn[hue(0)]] == [1.42, 2.42] and len(drawn[""]) == 1
    assert "neither attention nor an FFN" in dict(legend_of(found))["refused"]


def test_a_mixer_of_another_layer_has_a_column_of_its_own() -> None:
    found = columns_of(GraphReport(blocks_before=(mixer(0), ffn(1, None), mixer(1), ffn(1, None), ffn(1, None))))
    assert [(one.label, one.mixer, one.width) for one in found] == [
        ("0", "kept", 0),
        ("1", "none", 64),
        ("1", "kept", 64),
        ("1", "none", 64),
    ]


def test_a_column_says_why_it_was_not_fused() -> None:
    title = columns_of(graph_report())[0].title
    assert title.splitlines() == [
        "model.layers.0",
        "token mixer: attention_op",
        "model.layers.0.mlp",
        "FFN, intermediate width 64",
        "not fused (policy): kept by the policy",
        "m.py:7",
    ]
    assert "top-k <routing>" in columns_of(graph_report())[3].title


# --- points and intervals -----------------------------------------------------------------------------


def point(depth: int, perplexity: float | None, front: bool, size: int | None = None) -> SweepPoint:
    found = None if perplexity is None else Interval(perplexity, perplexity - 1, perplexity + 1)
    return SweepPoint(label="", depth=depth, perplexity=found, front=front, fused_bytes=size)


def test_the_front_goes_through_its_points_from_left_to_right() -> None:
    shown = [(12.0, Interval(20.0, 19.0, 21.0), True), (10.0, Interval(25.0), True), (11.0, Interval(30.0), False)]
    (axes,) = measures.draw_panel(shown, "FFN depth", "perplexity").axes
    lines = [[*zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in axes.lines]
    assert lines == [
        [(12.0, 19.0), (12.0, 21.0)],
        [(12.0, 20.0)],
        [(10.0, 25.0)],
        [(11.0, 30.0)],
        [(10.0, 25.0), (12.0, 20.0)],
    ]
    faces = [line.get_markerfacecolor() for line in axes.lines[1:4]]
    assert faces == [ink("h0"), ink("h0"), ink("card")]
    assert labels(axes.xaxis) == ["10", "11", "12"] and axes.get_xlabel() == "FFN depth"


def test_points_lead_to_their_rows() -> None:
    sweep = [point(12, 20.0, True), point(9, None, False), point(10, 25.0, True)]
    (chart,) = measures.panels(sweep, ["a", "b", "c"])
    first, second = chart.spots
    assert (first.title, first.href, second.title, second.href) == ("a", "#sweep-0", "c", "#sweep-2")
    assert first.left > second.left and first.top > second.top


def test_bytes_get_a_plot_of_their_own_in_a_readable_unit() -> None:
    first, second = measures.panels([point(12, 20.0, True, 0), point(10, 25.0, True, 3 * 2**30)], ["", ""])
    assert "by FFN depth: FFNs that are left" in first.svg and "fused weights (GiB)" in second.svg
    assert measures.best_of([(0, 20.0), (3, 25.0)]) == [(0, 20.0)]  # more bytes at a higher perplexity: no front


def test_a_sweep_without_quality_has_no_plot() -> None:
    assert measures.panels([point(12, None, False, 5)], [""]) == [] and measures.panels([], []) == []


def test_the_loss_is_plotted_where_there_is_no_perplexity() -> None:
    (chart,) = measures.panels([SweepPoint(label="", depth=3, loss=Interval(2.0))], [""])
    assert "loss (nats per token)" in chart.svg


def test_losses_far_apart_get_a_logarithmic_axis() -> None:
    for value, scale, title in ((99.0, "log", "loss, log scale"), (79.0, "linear", "loss")):
        (axes,) = measures.draw_panel([(1, Interval(20.0), True), (2, Interval(value), True)], "depth", "loss").axes
        assert (axes.get_yscale(), axes.get_title("left")) == (scale, title)


def test_intervals_share_an_axis_and_open_ends_reach_its_end() -> None:
    rows = [Interval(1.0, 0.5, 1.5), Interval(2.0, 1.75, None), Interval(3.0), Interval(None), None]
    (axes,) = measures.draw_measures("ratio", [(str(at), one) for at, one in enumerate(rows)], 0.0).axes
    closed, first, open_, second, exact, anchor = axes.lines
    assert list(closed.get_xdata()) == [0.5, 1.5] and list(closed.get_ydata()) == [0, 0]
    assert list(open_.get_xdata()) == [1.75, axes.get_xlim()[1]]
    assert [list(one.get_xdata()) for one in (first, second, exact)] == [[1.0], [2.0], [3.0]]
    assert list(anchor.get_xdata()) == [0, 0] and axes.get_xlim()[0] < 0 and axes.get_ylim() == (4.5, -0.5)
    assert measures.measures("name", "ratio", [("a", None), ("b", Interval(None))]) is None


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, math.pi])
def test_a_single_value_stands_in_the_middle(value: float) -> None:
    (axes,) = measures.draw_measures("a", [("b", Interval(value))], None).axes
    assert sum(axes.get_xlim()) / 2 == pytest.approx(value)
