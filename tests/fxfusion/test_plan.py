"""FusionPlan: validates itself, and says which field is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from fxfusion import FusionPlan
from fxfusion.errors import PlanError


def test_a_plan_keeps_what_it_was_given() -> None:
    plan = FusionPlan(groups=[[4, 5], ["model.layers.7.mlp", 8]], dropped_attention=[5, 8], norm="last")
    assert plan.groups == ((4, 5), ("model.layers.7.mlp", 8))
    assert plan.dropped_attention == (5, 8) and plan.norm == "last"
    assert FusionPlan.resolve(plan) is plan
    assert FusionPlan.resolve(plan.model_dump()) == plan
    assert FusionPlan() == FusionPlan(groups=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": [[4]]}, "group 0 has 1 member"),
        ({"groups": [[1, 2], []]}, "group 1 has 0 member"),
        ({"groups": [[4, 4]]}, "4 is in group 0 and again in group 0"),
        ({"groups": [[4, 5], [5, 6]]}, "5 is in group 0 and again in group 1"),
        ({"groups": [[-1, 0]]}, "layer -1 is negative"),
        ({"groups": 3}, "groups"),
        ({"groups": [[1.5, 2]]}, "groups"),
        ({"dropped_attention": [-1]}, "dropped_attention: a layer number is negative"),
        ({"dropped_attention": [1, 1]}, "dropped_attention: a layer is named twice"),
        ({"norm": "first"}, "norm"),
        ({"grups": [[1, 2]]}, "unknown field 'grups' \\(known: groups"),
    ],
)
def test_wrong_plans(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"plan: .*{message}"):
        FusionPlan(**fields)
    with pytest.raises(PlanError, match=f"plan: .*{message}"):
        FusionPlan.resolve(fields)


def test_other_things_are_no_plans() -> None:
    with pytest.raises(PlanError, match="expected a FusionPlan or a dict, got list"):
        FusionPlan.resolve([[1, 2]])  # type: ignore[arg-type]
