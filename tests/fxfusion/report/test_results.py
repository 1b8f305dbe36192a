"""The data of the page of results: plain JSON and back, and errors that name the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fxfusion.errors import FxFusionError
from fxfusion.report import FusionReport
from fxfusion.report.results import Interval, Matrix, Results
from tests.fxfusion.report.results_samples import almost_empty, everything


@pytest.mark.parametrize("results", [everything(), almost_empty(), Results()], ids=["all", "name", "nothing"])
def test_results_survive_json(results: Results) -> None:
    text = json.dumps(results.to_dict(), allow_nan=False)
    assert Results.from_dict(json.loads(text)) == results


def test_a_changed_number_is_another_result() -> None:
    data = everything().to_dict()
    data["quality"][0]["loss"]["value"] += 1e-9
    assert Results.from_dict(data) != everything()


def test_missing_parts_are_left_out() -> None:
    assert almost_empty().to_dict() == {"model": {"name": "some/model"}}


def test_a_report_survives_json_without_its_graph_modules() -> None:
    report = everything().report
    assert report is not None
    again = FusionReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report and again.refusals[0].code is report.refusals[0].code
    assert again.summary == report.summary and str(again) == str(report)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"modle": {}}, "modle: unknown field"),
        ({"model": {"name": "a", "depth": 3}}, "model.depth: unknown field"),
        ({"model": {"name": 3}}, "model.name"),
        ({"quality": [{"name": "a", "loss": {"value": "x"}}]}, "quality.0.loss.value"),
        ({"layers": [{"number": 0, "mixer": "gone"}]}, "layers.0.mixer"),
        ({"report": {"graphs": [{"refusals": [{"code": "new", "message": ""}]}]}}, "report"),
        ({"report": {"graphs": 3}}, "report: Value error, a report has a list of `graphs`"),
        ([], "results"),
    ],
)
def test_a_wrong_field_is_named(data: Any, named: str) -> None:
    with pytest.raises(FxFusionError, match="these are no results") as error:
        Results.from_dict(data)
    assert named in str(error.value)


@pytest.mark.parametrize("values", [((0.0, 1.0),), ((0.0,), (0.0,)), ((0.0, 1.0), (0.0,))])
def test_a_matrix_is_square(values: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(FxFusionError, match="2 layers need 2 x 2 values"):
        Matrix(layers=(0, 1), values=values)


def test_what_is_not_finite_is_none() -> None:
    assert Interval(1.0, -math.inf, math.inf) == Interval(1.0)
    assert Interval(math.nan) == Interval(None)
    assert Matrix(layers=(0, 1), values=((0.0, math.nan), (0.0, 0.0))).values[0] == (0.0, None)
