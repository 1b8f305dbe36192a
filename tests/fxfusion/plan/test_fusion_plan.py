"""FusionPlan: validates itself, says which field is wrong, and takes files wherever it takes dicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import fxfusion
from fxfusion import FusionPlan, explain, ffn_fusion, last_reports
from fxfusion.compiler.options import BackendOptions
from fxfusion.errors import PlanError
from fxfusion.plan.fusion_plan import LayerScore, MadeBy, ModelFacts, Scores, Versions, schema_text
from tests.blocks import stack, tokens

SCHEMA = Path(__file__).resolve().parents[3] / "docs/plan.schema.json"
FACTS = {"architecture": "Stack", "layers": 4}


def test_a_plan_keeps_what_it_was_given() -> None:
    plan = FusionPlan(groups=[[4, 5], ["model.layers.7.mlp", 8]], dropped_attention=[5, 8], norm="last")
    assert plan.groups == ((4, 5), ("model.layers.7.mlp", 8))
    assert plan.dropped_attention == (5, 8) and plan.norm == "last"
    assert FusionPlan.resolve(plan) is plan
    assert FusionPlan.resolve(plan.model_dump()) == plan
    assert FusionPlan() == FusionPlan(groups=[])


def test_a_group_is_a_set_of_layers() -> None:
    assert FusionPlan(groups=[[5, 4]]) == FusionPlan(groups=[[4, 5]])
    assert FusionPlan(groups=[[4, 5]]) != FusionPlan(groups=[[4, 6]])
    assert FusionPlan(groups=[[np.int64(1), 2]]).groups == ((1, 2),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": [[4]]}, "groups[0]: group 0 has 1 member; a group needs at least two"),
        ({"groups": [[1, 2], []]}, "groups[1]: group 1 has 0 members"),
        ({"groups": [[4, 4]]}, "groups[0]: layer 4 is in group 0 and again in group 0"),
        ({"groups": [[4, 5], [5, 6]]}, "groups[1]: layer 5 is in group 0 and again in group 1"),
        ({"groups": [["a.1", "a.2"], ["a.1", 3]]}, "groups[1]: 'a.1' is in group 0 and again in group 1"),
        ({"groups": [[-1, 0]]}, "groups[0][0]: layer -1 is negative"),
        ({"groups": 3}, "groups: expected a list, got 3"),
        ({"groups": [3, 4]}, "groups[0]: expected a list, got 3"),
        ({"groups": [[1.5, 2]]}, "groups[0][0]: a member is a layer number or the module path of an FFN, got 1.5"),
        ({"groups": [[1, True]]}, "groups[0][1]: a member is a layer number or the module path of an FFN, got True"),
        ({"groups": [[1, ""]]}, "groups[0][1]: a member is"),
        ({"dropped_attention": [3, -1]}, "dropped_attention[1]: layer -1 is negative"),
        ({"dropped_attention": [1, 2, 1]}, "dropped_attention[2]: layer 1 is named twice"),
        ({"dropped_attention": ["1"]}, "dropped_attention[0]: a layer is a whole number, got '1'"),
        ({"norm": "first"}, "norm: Input should be 'fold' or 'last', got 'first'"),
        ({"grups": [[1, 2]]}, "unknown field 'grups' (known: groups"),
        ({3: 4}, "unknown field '3'"),
        ({"version": 2}, "version: this plan has format 2, newer than this fxfusion can read (1); update fxfusion"),
        ({"version": 0}, "version: expected 1, got 0"),
        ({"version": True}, "version: expected 1, got True"),
        ({"version": "1"}, "version: expected 1, got '1'"),
        ({"model": {"layers": 4}}, "model.architecture: is missing"),
        ({"model": FACTS | {"layers": 0}}, "model.layers: Input should be greater than or equal to 1, got 0"),
        ({"model": FACTS | {"hidden": "8"}}, "model.hidden: expected a whole number, got '8'"),
        ({"model": FACTS | {"size": 8}}, "model.size: unknown field 'size' (known: architecture, layers"),
        ({"model": 4}, "model: expected fields with values (name: value), got 4"),
        ({"model": FACTS, "groups": [[2, 3], [4, 5]]}, "groups[1][0]: layer 4 does not exist: the model has 4 layers"),
        ({"model": FACTS, "dropped_attention": [0, 4]}, "dropped_attention[1]: layer 4 does not exist"),
        ({"model": FACTS, "scores": {"method": "kl", "values": [{"layer": 9, "value": 1}]}}, "scores.values[0].layer"),
        ({"scores": {"method": 1, "values": []}}, "scores.method: expected text, got 1"),
        ({"scores": {"method": "kl", "values": [{"layer": 1}]}}, "scores.values[0].value: is missing"),
        (
            {"scores": {"method": "kl", "values": [{"layer": 1, "value": "x"}]}},
            "scores.values[0].value: expected a num",
        ),
        ({"scores": {"method": "kl", "values": [{"layer": 1, "value": float("nan")}]}}, "expected a finite number"),
        (
            {"scores": {"method": "kl", "values": [{"layer": 1, "value": 1}, {"layer": 1, "value": 2}]}},
            "scores.values[1]: layer 1 is scored twice",
        ),
        ({"made_by": {"seed": 1.5}}, "made_by.seed: expected a whole number, got 1.5"),
        ({"made_by": {"versions": {"jax": "1"}}}, "made_by.versions.jax: unknown field 'jax' (known: fxfusion"),
        ({"residue": {"file": "a.st", "sha256": "ab"}}, "residue.sha256: String should match pattern"),
        ({"residue": {"file": "a.st"}}, "residue.sha256: is missing"),
        ({"norm": "x", "groups": 3}, "groups: expected a list, got 3; norm: Input should be"),
    ],
)
def test_wrong_plans(fields: dict[Any, Any], message: str) -> None:
    with pytest.raises(PlanError) as found:
        FusionPlan.resolve(fields)
    assert str(found.value).startswith("plan: ") and message in str(found.value)


def test_a_wrong_field_by_name() -> None:
    with pytest.raises(PlanError, match="plan: groups: expected a list, got 3"):
        FusionPlan(groups=3)


def test_other_things_are_no_plans() -> None:
    with pytest.raises(PlanError, match="expected a FusionPlan or a dict, got list"):
        FusionPlan.resolve([[1, 2]])
    with pytest.raises(PlanError, match="got 'paper' \\(or a plan file: .yaml, .yml, .json\\)"):
        FusionPlan.resolve("paper")


def test_records_do_not_change_what_is_fused() -> None:
    plain = FusionPlan(groups=[[0, 1]], dropped_attention=[1])
    recorded = plain.replace(
        model=ModelFacts(architecture="Stack", layers=3),
        scores=Scores(method="kl", values=(LayerScore(layer=1, value=0.5, error=0.1),)),
        made_by=MadeBy.now("fxfusion plan", seed=3),
    )
    assert recorded != plain and recorded.groups == plain.groups and hash(recorded) != hash(plain)
    assert recorded.replace(model=None, scores=None, made_by=None) == plain
    model, x = stack(), tokens()
    one, two = (explain(model, x, plan=plan).to_dict() for plan in (plain, recorded))
    for report in (one, two):
        del report["graphs"][0]["passes"]  # they hold times
    assert one == two and len(one["graphs"][0]["groups"]) == 1


def test_a_copy_is_checked_and_a_plan_is_frozen() -> None:
    plan = FusionPlan(groups=[[0, 1]])
    with pytest.raises(PlanError, match="groups"):
        plan.replace(groups=[[0]])
    with pytest.raises(ValidationError, match="frozen"):
        plan.norm = "last"  # type: ignore[misc]
    assert plan.norm == "fold"


def test_numbers_keep_six_digits() -> None:
    assert LayerScore(layer=0, value=1 / 3).value == 0.333333
    assert LayerScore(layer=0, value=-1.23456789e-9).value == -1.23457e-9
    again = LayerScore(layer=0, value=0.333333).value
    assert again == 0.333333, "rounding twice is rounding once"


def test_the_record_of_now() -> None:
    made = MadeBy.now("fxfusion plan", seed=7)
    assert made.command == "fxfusion plan" and made.seed == 7
    assert made.versions is not None and made.versions.torch == torch.__version__
    assert made.versions.fxfusion == fxfusion.__version__
    assert made.date is not None and made.date.endswith("+00:00")
    assert MadeBy(versions=Versions(torch="1")) != made


def test_where_a_layer_is_unknown() -> None:
    plan = FusionPlan(groups=[[0, 1], ["layers.2.ffn", 3]], dropped_attention=[5])
    assert plan.unknown_layer(6) is None
    assert plan.unknown_layer(5) == (
        ("dropped_attention", 0),
        "layer 5 does not exist: the model has 5 layers, counted from 0",
    )
    found = plan.unknown_layer(3)
    assert found is not None and found[0] == ("groups", 1, 1)


# --- files where a dict would do ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml", "plan.json", "plan.YAML", "plan"])
def test_a_path_resolves(tmp_path: Path, name: str) -> None:
    plan = FusionPlan(groups=[[0, 1]])
    plan.save(tmp_path / name)
    assert FusionPlan.resolve(tmp_path / name) == plan
    assert FusionPlan.resolve(str(tmp_path / name)) == plan


def test_a_missing_file_is_no_preset(tmp_path: Path) -> None:
    for name in ("gone.yaml", "gone.YML", "gone.json"):
        with pytest.raises(PlanError, match=f"{name}: cannot be read: No such file"):
            FusionPlan.resolve(str(tmp_path / name))
    with pytest.raises(PlanError, match="gone: cannot be read: No such file"):
        FusionPlan.resolve(tmp_path / "gone")


def test_a_file_reaches_explain_and_the_backend(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    FusionPlan(groups=[[1, 2]], norm="last").save(path)
    model, x = stack(), tokens()
    names = ["layers.1.ffn", "layers.2.ffn"]
    for given in (path, str(path)):
        (group,) = explain(model, x, plan=given).groups
        assert [member.name for member in group.members] == names and group.norm == "last"
        assert BackendOptions.parse({"plan": given}, None).choice == FusionPlan.load(path)
    torch.compile(model, backend=ffn_fusion, options={"plan": str(path), "compiler": "eager"})(x)
    assert [[member.name for member in group.members] for group in last_reports()[-1].groups] == [names]


# --- schema -------------------------------------------------------------------------------------------


def test_the_committed_schema_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        SCHEMA.write_text(schema_text(), "utf-8")
    assert SCHEMA.read_text("utf-8") == schema_text(), "run pytest with --update-golden and read what it writes"


def test_the_schema_knows_every_field() -> None:
    schema = json.loads(schema_text())
    assert set(schema["properties"]) == {*FusionPlan.model_fields, "hoist"}
    assert schema["additionalProperties"] is False
    group = schema["properties"]["groups"]["items"]["anyOf"][0]
    assert group["minItems"] == 2
    assert group["items"]["anyOf"] == [{"minimum": 0, "type": "integer"}, {"minLength": 1, "type": "string"}]
    assert schema["properties"]["dropped_attention"]["items"] == {"minimum": 0, "type": "integer"}
    assert set(schema["$defs"]) == {
        *("LayerFit", "LayerScore", "MadeBy", "MeasuredQuality", "ModelFacts", "Refit", "ResidueFile", "Scores"),
        "Versions",
    }


# --- layers that go whole -----------------------------------------------------------------------------


def test_removed_layers_have_no_other_part_in_a_plan() -> None:
    plan = FusionPlan(removed=[7, 2], groups=[[3, 4]])
    assert plan.removed == (2, 7) and plan.to_dict()["removed"] == [2, 7] and not plan.changes_nothing
    assert "removed" not in FusionPlan(groups=[[3, 4]]).to_dict(), "older versions read such a plan"
    with pytest.raises(PlanError, match=r"groups\[0\]\[1\]: layer 4 is removed as a whole"):
        FusionPlan(removed=[4], groups=[[3, 4]])
    with pytest.raises(PlanError, match=r"dropped_attention\[0\]: layer 4 is removed as a whole"):
        FusionPlan(removed=[4], dropped_attention=[4])
    with pytest.raises(PlanError, match=r"removed\[1\]: layer 4 is removed twice"):
        FusionPlan(removed=[4, 4])
    with pytest.raises(PlanError, match=r"removed\[0\]: layer -1 is negative"):
        FusionPlan(removed=[-1])
