from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.cli.conftest import LAYERS, SMALL, Run


@pytest.fixture
def args(model: Path, text: Path, results: Path) -> list[object]:
    return ["plan", model, "--text", text, "--results", results, *SMALL]


def test_a_plan_is_written_with_what_it_costs_and_what_comes_next(
    run: Run, args: list[object], results: Path, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "mine.yaml"
    ran = run(*args, "--drop-attention", "1-2", "--target-depth", 2, "--output", out, "--seed", 0)
    assert ran.code == 0, ran.err
    plan = FusionPlan.load(out)
    assert plan == FusionPlan.load(results / "plan.yaml")
    assert plan.dropped_attention == (1, 2) and len(plan.groups) == 1 and len(plan.groups[0]) == 2
    assert plan.model is not None and plan.model.layers == LAYERS
    assert plan.made_by is not None and plan.made_by.seed == 0
    assert str(plan.made_by.command).startswith(f"fxfusion plan {model}")
    assert f"FFN depth: {LAYERS} -> 2" in ran.out and "attention dropped in 2 layers: 1-2" in ran.out
    assert f"fxfusion eval {model} --plan {out} --results {results}" in ran.out
    assert json.loads((results / "compiled.json").read_text())["summary"]["groups"] == 1
    assert DependencyMatrix.load(results / "matrix_1_2").dropped_attention == (1, 2)


@pytest.mark.slow
def test_planning_again_measures_nothing_again(run: Run, args: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.analysis import meter
    from fxfusion.models.traced import TracedGraph

    first = run(*args, "--drop", 2, "--json").json
    assert len(first["plan"]["dropped_attention"]) == 2 and first["quality"]["intact model"]["kl"]["value"] == 0
    monkeypatch.setattr(TracedGraph, "run", lambda *_, **__: pytest.fail("the model was run again"))
    monkeypatch.setattr(meter, "evaluate", lambda *_, **__: pytest.fail("a plan was measured again"))
    again = run(*args, "--drop", 2, "--json").json
    assert again["quality"] == first["quality"] and again["plan"]["groups"] == first["plan"]["groups"]
    with pytest.raises(pytest.fail.Exception):
        run(*args, "--drop", 1)


@pytest.mark.slow
def test_the_papers_rule_leaves_the_ends_out_and_drops_every_attention_with_a_warning(
    run: Run, args: list[object]
) -> None:
    ran = run(*args, "--preset", "paper", "--drop", "100%", "--json")
    assert ran.json["plan"]["groups"] == [[0, 1]] and ran.json["plan"]["norm"] == "last"
    assert ran.json["plan"]["dropped_attention"] == list(range(LAYERS))
    assert "fxfusion: warning: the plan drops every attention" in ran.err
    ran = run(*args, "--preset", "paper", "--drop-attention", "1-2", "--json")
    assert ran.json["plan"]["groups"] == []  # the FFN of layer 0 leads, that of layer 2 is the last
    assert "warning" not in ran.err


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--drop", "many"], 2, "--drop"),
        (["--drop", "1", "--drop-attention", "1"], 2, "--drop and --drop-attention were both given"),
        (["--drop", "9"], 2, "--drop: 9 attention layers are to go, the model has 3"),
        (["--drop-attention", "7"], 2, "[7]"),
        (["--drop-attention", "4-2"], 2, "backwards"),
        (["--splits", "2"], 2, "--splits: it goes with --preset paper"),
        (
            ["--hardware", "h100"],
            2,
            "--hardware: latency is predicted under a budget, one of --max-perplexity-increase",
        ),
        (["--max-latency", "1"], 2, "--max-latency: name the device that it is predicted for, such as --hardware h100"),
        (["--drop", "1", "--tp", "8"], 2, "--tp: name the device"),
        (["--preset", "paper", "--max-kl", "1"], 2, "--max-kl"),
        (["--preset", "paper", "--norm", "fold"], 2, "--norm"),
        (["--preset", "magic"], 2, "--preset"),
        (["--max-bytes", "5X"], 2, "--max-bytes"),
        (["--max-perplexity-increase", "-5%"], 2, "--max-perplexity-increase"),
        (["--text", "none.txt"], 2, "none.txt"),
    ],
)
def test_what_cannot_be_is_exit_code_2_and_named(
    run: Run, args: list[object], results: Path, more: list[object], code: int, named: str
) -> None:
    ran = run(*args, *more)
    assert ran.code == code and named in ran.err and ran.out == "" and "Traceback" not in ran.err
    assert not (results / "plan.yaml").exists()


def test_a_budget_that_no_plan_keeps_says_what_is_possible(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args, "--drop-attention", "1", "--target-depth", 1)
    assert ran.code == 2 and "no plan fits the budget" in ran.error and "2 to 3 FFNs" in ran.error
    assert not (results / "plan.yaml").exists()


def test_a_dry_run_says_what_is_known(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args, "--drop", 2, "--dry-run", "--json")
    assert [part["known"] for part in ran.json["work"]] == ["known", "begun", "", ""]
    assert [part["passes"] for part in ran.json["work"]] == [1 + 3, 1 + 3 + 2 + 2, None, None], "not the third step"
    assert ran.json["writes"][0] == str(results / "plan.yaml") and not (results / "plan.yaml").exists()
    assert "--drop 2 is a count: 2 of 3 attention layers" in ran.err
    assert "--drop 1.0 is a share: 3 of 3 attention layers" in run(*args, "--drop", "1.0", "--dry-run").err
