"""PlannedGroup: a tuple of members that knows its mixers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from fxfusion import FusionPlan
from fxfusion.errors import PlanError
from fxfusion.plan.fusion_plan import schema_text
from fxfusion.plan.groups import PlannedGroup, with_mixers

HOIST = {"members": [4, 5], "mixers": "hoist"}


def test_a_group_is_a_tuple_that_knows_its_mixers() -> None:
    group = PlannedGroup([4, 5], "hoist")
    assert tuple(group) == (4, 5) and list(group) == [4, 5] and 4 in group and len(group) == 2
    assert group.mixers == "hoist" and group.is_window and not PlannedGroup([4, 5]).is_window
    assert PlannedGroup(group).mixers == "hoist" and PlannedGroup(group, "none").mixers == "none"


def test_the_same_members_with_other_mixers_are_another_group() -> None:
    plain, hoist, wide = (PlannedGroup((4, 5), mixers) for mixers in ("none", "hoist", "wide"))
    members = (4, 5)
    assert plain == members and members == plain and hash(plain) == hash(members) and (plain != members) is False
    assert hoist != members and members != hoist and hoist != plain and hoist != wide and hoist != PlannedGroup((4, 6))
    assert len({plain, hoist, wide, (4, 5), PlannedGroup((4, 5), "hoist")}) == 3
    assert hoist != "45" and repr(plain) == "(4, 5)" and repr(hoist) == "PlannedGroup((4, 5), 'hoist')"


@pytest.mark.parametrize("mixers", ["none", "hoist", "wide"])
def test_copies_keep_the_mixers(mixers: Any) -> None:
    group = PlannedGroup((4, 5), mixers)
    for other in (copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert other == group and other.mixers == mixers


def test_a_plan_keeps_the_mixers_of_its_groups(tmp_path: Path) -> None:
    plan = FusionPlan(groups=[HOIST, [1, 2], {"members": [8, 7], "mixers": "wide"}])
    assert [tuple(group) for group in plan.groups] == [(4, 5), (1, 2), (7, 8)]
    assert [plan.mixers_of(index) for index in range(3)] == ["hoist", "none", "wide"]
    assert plan.windows == (PlannedGroup((4, 5), "hoist"), PlannedGroup((7, 8), "wide"))
    assert plan.to_dict()["groups"] == [HOIST, [1, 2], {"members": [7, 8], "mixers": "wide"}]
    assert plan != FusionPlan(groups=[[4, 5], [1, 2], [7, 8]]) and FusionPlan.resolve(plan.model_dump()) == plan
    assert plan.replace(groups=plan.groups[:1]) == FusionPlan(groups=[HOIST])
    for name in ("plan.yaml", "plan.json"):
        plan.save(tmp_path / name)
        assert FusionPlan.load(tmp_path / name) == plan
    assert "- {members: [4, 5], mixers: hoist}\n- [1, 2]\n" in (tmp_path / "plan.yaml").read_text("utf-8")


def test_hoist_is_short_for_groups_that_do_not_say(tmp_path: Path) -> None:
    given = [[4, 5], {"members": [6, 7], "mixers": "wide"}, {"members": [8, 9], "mixers": "none"}, {"members": [1, 2]}]
    plan = FusionPlan(groups=given, hoist=True)
    assert [group.mixers for group in plan.groups] == ["hoist", "wide", "none", "hoist"]
    assert [group.mixers for group in FusionPlan(groups=given, hoist=False).groups] == ["none", "wide", "none", "none"]
    assert FusionPlan(groups=plan.groups) == plan and "hoist" not in FusionPlan.model_fields
    (tmp_path / "plan.yaml").write_text("groups:\n- [4, 5]\nhoist: true\n", "utf-8")
    assert FusionPlan.load(tmp_path / "plan.yaml") == FusionPlan(groups=[HOIST])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": [{"members": [1, -2], "mixers": "hoist"}]}, "groups[0].members[1]: layer -2 is negative"),
        ({"groups": [{"members": 3}]}, "groups[0].members: expected a list, got 3"),
        ({"groups": [{"members": [1]}]}, "groups[0]: group 0 has 1 member; a group needs at least two"),
        ({"groups": [{"members": [1, 2], "mixers": "x"}]}, "groups[0].mixers: expected one of none, hoist, wide"),
        ({"groups": [{"mixers": "wide"}]}, "groups[0].members: is missing"),
        ({"groups": [{"layers": [1, 2]}]}, "groups[0].layers: unknown field 'layers' (known: members, mixers)"),
        ({"groups": [[4, 5], {"members": [5, 6]}]}, "groups[1]: layer 5 is in group 0 and again in group 1"),
        ({"groups": [[1, 2]], "hoist": 1}, "hoist: expected true or false, got 1"),
        ({"groups": 3, "hoist": True}, "groups: expected a list, got 3"),
    ],
)
def test_wrong_groups(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as found:
        FusionPlan.resolve(fields)
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "groups:\n- members: [4,\n   -5]\n  mixers: hoist\n",
            "plan.yaml:3: groups[0].members[1]: layer -5 is negative",
        ),
        ("groups:\n- members: [4, 5]\n  mixers: lift\n", "plan.yaml:3: groups[0].mixers: expected one of none, hoist,"),
        ("groups:\n- {members: [5, 4], mixers: hoist}\n", "plan.yaml:2: groups[0]: the layers [5, 4] are not in incr"),
        ("groups:\n- [4, 5]\n- members: [5, 6]\n  mixers: wide\n", "plan.yaml:3: groups[1]: layer 5 is in group 0"),
        ("groups: []\n\nhoist: 3\n", "plan.yaml:3: hoist: expected true or false, got 3"),
    ],
)
def test_errors_name_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text, "utf-8")
    with pytest.raises(PlanError) as found:
        FusionPlan.load(tmp_path / "plan.yaml")
    assert message in str(found.value)


def test_the_schema_takes_both_spellings() -> None:
    properties = json.loads(schema_text())["properties"]
    plain, window = properties["groups"]["items"]["anyOf"]
    assert plain["type"] == "array" and window["properties"]["members"] == plain
    assert window["properties"]["mixers"]["enum"] == ["none", "hoist", "wide"]
    assert window["required"] == ["members"] and window["additionalProperties"] is False
    assert properties["hoist"]["type"] == "boolean"


def test_what_is_no_group_is_left_to_the_check() -> None:
    assert with_mixers(3, "hoist") == 3 and with_mixers("45", "hoist") == "45"
