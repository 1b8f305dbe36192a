"""segment: from roads through layers to a plan."""

from __future__ import annotations

import pytest

from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import PlannedGroup
from fxfusion.planning.roads.segment import Segment, check_roads, plan_of, windows


def test_segments_become_the_groups_and_drops_of_a_plan() -> None:
    segments = [Segment(7, 7, "drop", (7,)), Segment(4, 6, "drop", (5, 6)), Segment(2, 3, "hoist")]
    found = plan_of(segments, range(8), "last")
    groups = [PlannedGroup((2, 3), "hoist"), PlannedGroup((4, 5, 6))]
    assert found == FusionPlan(groups=groups, dropped_attention=[5, 6, 7], norm="last")
    assert found.groups[0].mixers == "hoist" and found.groups[1].mixers == "none"


def test_what_is_dropped_inside_need_not_move() -> None:
    mixed = Segment(2, 4, "wide").without(3)
    assert mixed.dropped == (3,) and mixed.group(range(6)) == PlannedGroup((2, 3, 4), "wide")
    assert Segment(2, 3, "wide").without(3).group(range(6)) == PlannedGroup((2, 3), "none")
    assert Segment(2, 3, "wide").without(2).group(range(6)) == PlannedGroup((2, 3), "wide"), "the first one stays put"
    assert Segment(2, 3, "hoist").group([0, 1]) == PlannedGroup((2, 3), "none"), "there is no attention in between"


def test_every_window_of_a_size_is_offered_on_every_road_that_differs() -> None:
    found = list(windows(4, ("drop", "hoist"), mixers=[0, 1, 3], size=2))
    expected = [
        Segment(0, 1, "drop", (1,)),
        Segment(0, 1, "hoist"),
        Segment(1, 2, "drop"),  # layer 2 has no attention: both roads are the same
        Segment(2, 3, "drop", (3,)),
        Segment(2, 3, "hoist"),
    ]
    assert found == expected


def test_roads_are_checked() -> None:
    assert check_roads(["wide", "drop"]) == ("drop", "wide") and check_roads("hoist") == ("hoist",)
    with pytest.raises(OptionError, match="expected some of drop, hoist, wide, got 'raise'"):
        check_roads(["hoist", "raise"])
    with pytest.raises(OptionError, match="got none"):
        check_roads([])


def test_overlapping_windows_are_an_error_that_names_the_layer() -> None:
    with pytest.raises(PlanError, match="layer 3 is in group 0 and again in group 1"):
        plan_of([Segment(2, 3, "hoist"), Segment(3, 4, "hoist")], range(6))
