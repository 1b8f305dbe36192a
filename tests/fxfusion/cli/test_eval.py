from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxfusion.analysis.planned import PlannedModel
from fxfusion.analysis.quality import evaluate
from fxfusion.cli import inputs
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.cli.conftest import LAYERS, SMALL, Run, make_model

PLAN = FusionPlan(groups=[[0, 1, 2]], dropped_attention=[1, 2])
FUSED = "fused: 3 FFNs in 1"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


@pytest.fixture
def args(model: Path, ids: Path, results: Path) -> list[object]:
    return ["eval", model, "--text", ids, "--results", results, *SMALL, "--compiler", "eager"]


def test_a_plan_is_measured_against_the_intact_model_with_a_control(
    run: Run, args: list[object], plan: Path, results: Path, model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled model gives the numbers of the plan by graph, which never went through the compiler."""
    ran = run(*args, "--plan", plan, "--json", "--generate", 2, "--new-tokens", 4)
    assert ran.code == 0, ran.err
    quality = ran.json["quality"]
    assert list(quality) == ["intact model", "without 2 attentions", FUSED]
    control = quality["intact model"]
    assert control["kl"]["value"] == control["loss_increase"]["value"] == 0
    assert control["top1"]["value"] == control["top5"]["value"] == 1
    intact = inputs.load_model(model, torch.device("cpu"), "float32")
    batches = inputs.read_batches([ids], None, length=16, batch=4, sequences=8, seed=0)
    for name, expected in ((FUSED, PLAN), ("without 2 attentions", PLAN.replace(groups=()))):
        by_graph = evaluate(PlannedModel(TracedModel(intact), expected), batches, intact)
        for measure in ("loss", "kl", "loss_increase"):
            found = quality[name][measure]
            assert found["value"] == pytest.approx(float(getattr(by_graph, measure)), rel=1e-4, abs=1e-6)
    assert quality[FUSED]["loss"]["value"] != pytest.approx(quality["without 2 attentions"]["loss"]["value"], rel=1e-4)
    assert ran.json["generation"]["prompts"] == 2 and len(ran.json["generation"]["samples"][0]["prompt"]) == 8
    assert json.loads((results / "compiled.json").read_text())["summary"]["groups"] == 1

    # Everything is kept: the same command measures nothing again, and tells the same.
    monkeypatch.setattr("fxfusion.analysis.quality.evaluate", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("fxfusion.analysis.generation.greedy_agreement", lambda *_, **__: pytest.fail("written again"))
    assert run(*args, "--plan", plan, "--json", "--generate", 2, "--new-tokens", 4).json == ran.json
    shown = run(*args, "--plan", plan, "--generate", 2, "--new-tokens", 4).out
    assert f"{control['perplexity']['value']:.2f}" in shown and "Greedy text" in shown
    with pytest.raises(pytest.fail.Exception):
        run(*args, "--plan", plan, "--seed", 1)
    monkeypatch.undo()

    # Of another plan only what differs is measured: not the control, nor what is the same without attention.
    before = set(json.loads((results / "quality.json").read_text())["kept"])
    PLAN.replace(norm="last").save(plan)
    assert run(*args, "--plan", plan).code == 0
    assert len(set(json.loads((results / "quality.json").read_text())["kept"]) - before) == 1


def test_without_a_plan_the_model_is_measured_alone(run: Run, args: list[object], results: Path, plan: Path) -> None:
    (results / "plan.yaml").write_bytes(plan.read_bytes())
    ran = run(*args, "--json")
    assert list(ran.json["quality"]) == ["intact model"] and ran.json["plan"] is None
    assert f"there is a plan in {results / 'plan.yaml'}" in ran.err


def test_another_folder_may_be_the_baseline(run: Run, args: list[object], tmp_path: Path, model: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    quality = run(*args, "--baseline", other, "--json").json["quality"]
    assert list(quality) == ["other", model.resolve().name]
    assert quality["other"]["kl"]["value"] == 0 < quality[model.resolve().name]["kl"]["value"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("groups: [[0, 1", "wrong.yaml:1: not valid YAML"),
        ("groups:\n- [0]\n", "wrong.yaml:2: groups[0]"),
        ("groups: [[8, 9]]", "layer 8 does not exist: the model has 3 layers"),
        ("model: {architecture: Other, layers: 3}\ngroups: [[0, 1]]", "made for another model: model.architecture"),
    ],
)
def test_a_wrong_plan_is_exit_code_2_with_line_or_field(
    run: Run, args: list[object], tmp_path: Path, content: str, named: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(content)
    ran = run(*args, "--plan", tmp_path / "wrong.yaml")
    assert ran.code == 2 and named in ran.error and ran.out == ""
    ran = run("explain", args[1], "--plan", tmp_path / "wrong.yaml")
    assert ran.code == 2 and named in ran.error and ran.out == ""


def test_groups_that_cannot_be_had_are_an_error_and_what_is_measured_stays(
    run: Run, args: list[object], tmp_path: Path, results: Path
) -> None:
    FusionPlan(groups=[[0, 1]]).save(tmp_path / "wrong.yaml")  # there is attention in between
    ran = run(*args, "--plan", tmp_path / "wrong.yaml")
    assert ran.code == 1 and "the plan does not fit this model" in ran.error and ran.out == ""
    assert len(json.loads((results / "quality.json").read_text())["kept"]) == 1  # the control


def test_a_loss_that_is_not_finite_is_an_error_and_what_is_measured_stays(
    run: Run, args: list[object], results: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfusion.cli import timing

    def broken(model: torch.nn.Module, plan: FusionPlan, compiler: str) -> torch.nn.Module:
        class Broken(torch.nn.Module):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = model(ids).logits
                return logits * float("nan")

        return Broken()

    monkeypatch.setattr(timing, "compiled", broken)
    ran = run(*args, "--plan", plan)
    assert ran.code == 1 and f"the loss of {FUSED!r} is not finite" in ran.error and ran.out == ""
    kept = json.loads((results / "quality.json").read_text())
    assert len(kept["kept"]) == 2 and kept["latest"] is None
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--plan", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read"),
        (["--baseline", "/nowhere"], 1, "/nowhere: no such folder"),
        (["--speed"], 2, "--speed: there is nothing fused to time"),
        (["--compiler", "gcc"], 2, "--compiler"),
    ],
)
def test_a_wrong_option_is_named(run: Run, args: list[object], more: list[object], code: int, named: str) -> None:
    ran = run(*args, *more)
    assert ran.code == code and named in ran.err and ran.out == ""


def test_a_dry_run_counts_the_passes(run: Run, args: list[object], plan: Path, results: Path) -> None:
    ran = run(*args, "--plan", plan, "--generate", 4, "--dry-run", "--json")
    assert [part["passes"] for part in ran.json["work"]] == [2, 1, 1, None]
    assert not (results / "quality.json").exists()


@pytest.mark.slow
@pytest.mark.compile
def test_inductor_is_what_users_run(run: Run, args: list[object], plan: Path) -> None:
    ran = run(*args, "--plan", plan, "--json")
    assert ran.code == 0, ran.err
    eager = ran.json["quality"][FUSED]
    ran = run(*args, "--plan", plan, "--json", "--compiler", "inductor", "--speed")
    assert ran.code == 0, ran.err
    assert ran.json["quality"][FUSED]["loss"]["value"] == pytest.approx(eager["loss"]["value"], rel=1e-5)
    for found in ran.json["speed"].values():
        assert set(found["fused_against"]) == {"unfused", "intact"}
        assert 0.3 < found["control"]["low"] <= found["control"]["high"] < 3
    assert "times faster than" in run(*args, "--plan", plan, "--compiler", "inductor", "--speed").out


@pytest.mark.slow
def test_tasks_of_lm_eval_are_run_on_both_models(run: Run, args: list[object], plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    questions = [{"question": str(2 + n), "choices": [str(3 + n), "39"], "answer": n % 2} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "next.yaml").write_text(
        f"""
task: next_number
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}, cache_dir: {tmp_path}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    ran = run(*args, "--plan", plan, "--json", "--tasks", "next_number", "--task-folder", tasks, "--task-limit", 8)
    assert ran.code == 0, ran.err
    assert list(ran.json["tasks"]) == ["intact model", FUSED]
    for scores in ran.json["tasks"].values():
        assert scores["next_number"]["samples"] == 8 and 0 <= scores["next_number"]["metrics"]["acc"]["value"] <= 1


def test_tasks_without_lm_eval_say_what_to_install(
    run: Run, args: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ran = run(*args, "--tasks", "anything")
    assert ran.code == 1 and "pip install 'fxfusion[eval]'" in ran.error


def test_explain_drops_what_the_plan_drops(run: Run, model: Path, plan: Path) -> None:
    """On the meta device: nothing is loaded."""
    assert run("explain", model).code == 3  # attention in every layer
    ran = run("explain", model, "--plan", plan, "--json")
    assert ran.code == 0, ran.err
    (group,) = ran.json["graphs"][0]["groups"]
    assert len(group["members"]) == LAYERS


@pytest.mark.slow
def test_probes_are_asked_of_every_variant(
    run: Run, args: list[object], plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(*args, "--plan", plan, "--probes", 2, "--json")
    assert ran.code == 0, ran.err
    assert list(ran.json["probes"]) == list(ran.json["quality"])
    for found in ran.json["probes"].values():
        assert {kind: len(solved) for kind, solved in found["solved"].items()} == dict.fromkeys(
            ("copy", "recall", "brackets", "add", "repeat"), 2
        )
        assert set(found["kept"]) == {*found["solved"], "all"}
    control = ran.json["probes"]["intact model"]
    assert control["kept"]["all"] in (None, 1.0)
    monkeypatch.setattr("fxfusion.analysis.probes.probe", lambda *_, **__: pytest.fail("asked again"))
    assert "probes solved" in run(*args, "--plan", plan, "--probes", 2).out


def test_a_plan_that_removes_layers_is_refused(run: Run, args: list[object], tmp_path: Path) -> None:
    FusionPlan(removed=[1]).save(tmp_path / "removed.yaml")
    error = run(*args, "--plan", tmp_path / "removed.yaml").error
    assert "the plan removes layers 1, and eval compiles the model as it is" in error
