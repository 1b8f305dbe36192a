"""Roads: the segments that they offer, and what these are in a plan."""

from __future__ import annotations

import pytest

from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import PlannedGroup
from fxfusion.planning.roads import check_roads, is_on_one_road, plan_of
from fxfusion.planning.roads.road import Segment
from fxfusion.planning.scores import Screen
from tests.fxfusion.planning.priced_meter import PricedMeter


def test_segments_become_the_groups_and_drops_of_a_plan() -> None:
    segments = [Segment(7, 7, "drop", (7,)), Segment(4, 6, "drop", (5, 6)), Segment(2, 3, "hoist")]
    found = plan_of(segments, range(8), "last")
    groups = [PlannedGroup((2, 3), "hoist"), PlannedGroup((4, 5, 6))]
    assert found == FusionPlan(groups=groups, dropped_attention=[5, 6, 7], norm="last")
    assert found.groups[0].mixers == "hoist" and found.groups[1].mixers == "none"


def test_what_is_dropped_inside_need_not_move() -> None:
    mixed = Segment(2, 4, "wide").without(3)
    assert mixed.dropped == (3,) and mixed.keeping(3) == Segment(2, 4, "wide")
    for segment, mixers, mode in (
        (mixed, range(6), "wide"),
        (Segment(2, 3, "wide").without(3), range(6), "none"),
        (Segment(2, 3, "wide").without(2), range(6), "wide"),  # the first one stays put
        (Segment(2, 3, "hoist"), [0, 1], "none"),  # there is no attention in between
    ):
        assert [group.mixers for group in plan_of([segment], mixers).groups] == [mode]


def test_every_window_of_a_size_is_offered_on_every_road_that_differs() -> None:
    screen = Screen(PricedMeter(layers=4, mixers=[0, 1, 3]), ("drop", "hoist"))
    found = sorted(one for road in screen.roads for one in screen.windows(2, road))
    expected = [
        Segment(0, 1, "drop", (1,)),
        Segment(0, 1, "hoist"),
        Segment(1, 2, "drop"),  # layer 2 has no attention: both roads are the same
        Segment(2, 3, "drop", (3,)),
        Segment(2, 3, "hoist"),
    ]
    assert found == expected


def test_a_layer_that_is_removed_is_a_segment_of_its_own() -> None:
    screen = Screen(PricedMeter(layers=3), ("drop", "remove"))
    assert list(screen.windows(1, "remove")) == [Segment(layer, layer, "remove") for layer in range(3)]
    assert not list(screen.windows(2, "remove"))
    found = plan_of([Segment(3, 3, "remove"), Segment(2, 2, "remove"), Segment(0, 1, "hoist")], range(4))
    assert found == FusionPlan(removed=[2, 3], groups=[PlannedGroup((0, 1), "hoist")])
    assert not is_on_one_road(found) and is_on_one_road(found.replace(groups=()))


def test_roads_are_checked() -> None:
    assert check_roads(["wide", "drop"]) == ("drop", "wide") and check_roads("hoist") == ("hoist",)
    with pytest.raises(OptionError, match="expected some of drop, hoist, wide, remove, got 'raise'"):
        check_roads(["hoist", "raise"])
    with pytest.raises(OptionError, match="got none"):
        check_roads([])


def test_overlapping_windows_are_an_error_that_names_the_layer() -> None:
    with pytest.raises(PlanError, match="layer 3 is in group 0 and again in group 1"):
        plan_of([Segment(2, 3, "hoist"), Segment(3, 4, "hoist")], range(6))


def test_a_plan_is_on_one_road_or_on_several() -> None:
    hoisted, wide, dropped = Segment(0, 1, "hoist"), Segment(2, 3, "wide"), Segment(4, 5, "drop", (5,))
    assert all(is_on_one_road(plan_of(segments, range(6))) for segments in ([], [hoisted], [wide], [dropped]))
    assert not is_on_one_road(plan_of([hoisted, wide], range(6)))
    assert not is_on_one_road(plan_of([hoisted, dropped], range(6)))
