"""`fxfusion auto`, and `fxfusion plan` over several roads: a plan, a checkpoint, its loss and its speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fxfusion
from fxfusion.cli.auto import divided, over_budget
from fxfusion.errors import OptionError
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.cli.conftest import Run
from tests.fxfusion.recovery.own_text import LENGTH, model_of, own_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts its own text."""
    path = tmp_path_factory.mktemp("own")
    model_of().save_pretrained(path / "model")
    save_file({"input_ids": torch.cat(own_text()).to(torch.int32)}, path / "text.safetensors")
    return path


@pytest.fixture
def args(folder: Path, tmp_path: Path) -> list[object]:
    text = ["--text", folder / "text.safetensors", "--length", LENGTH, "--batch", 16, "--sequences", 96]
    return [folder / "model", *text, "--results", tmp_path / "results"]


@pytest.mark.slow
def test_one_command_gives_a_plan_a_checkpoint_its_loss_and_its_speed(
    run: Run, args: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "fused"
    more = ["--target-depth", 3, "--roads", "hoist", "--max-window", 2]
    ran = run("auto", *args, "--output", out, *more, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    plan = FusionPlan.load(tmp_path / "results" / "plan.yaml")
    assert found["depth"] == {"intact": 4, "plan": 3} and plan.to_dict() == found["plan"]
    assert [group.mixers for group in plan.groups] == ["hoist"]
    control, fused = found["quality"]["intact model"], found["quality"]["fused and refitted"]
    assert control["kl"]["value"] == 0 and fused["kl"]["value"] > 0
    assert set(found["speed"]) == {"a prompt, eager", "one token, eager"}
    assert all(one["seconds"]["fused"] > 0 for one in found["speed"].values())
    for said in ("1. choose: 3 windows", "an estimate from one block", "GB of disk", "(5 of 5) write", "in all"):
        assert said in ran.err, said

    loaded = fxfusion.from_pretrained(out)
    assert [list(group) for group in plan_of(loaded).groups] == [list(group) for group in plan.groups]
    held_out = divided([batch.long() for batch in torch.cat(own_text()).split(16)])[1]
    assert len(held_out) == 1
    again = run("auto", *args, "--output", out, *more)
    assert again.code == 0 and "times faster" in again.out and f"written: {out}" in again.out
    assert "hoist" in again.out and "FFN depth: 4 -> 3" in again.out

    # What was measured is in the results folder, and only for what it was measured of.
    page = run("report", "--results", tmp_path / "results", "--json").json["results"]
    assert [row["name"] for row in page["quality"]] == ["intact model", "fused and refitted"]
    assert len(page["speed"]) == 2 and "after its refit" in page["notes"][0]
    other = run("auto", *args, "--output", out, *more, "--profile", "thorough")
    assert other.code == 1 and "another profile (balanced, not thorough)" in other.error
    other = run("auto", *args[:-3], 64, *args[-2:], "--output", out, *more)
    assert other.code == 1 and "another text" in other.error
    fuse = ["fuse", args[0], "--plan", tmp_path / "results" / "plan.yaml", "--results", tmp_path / "results"]
    assert "is the plan after a refit" in run(*fuse, "--output", tmp_path / "raw").error


@pytest.mark.slow
def test_where_nothing_is_within_the_budget_nothing_is_written(run: Run, args: list[object], tmp_path: Path) -> None:
    out = tmp_path / "fused"
    more = ["--roads", "hoist", "--max-members", 1, "--max-perplexity-increase", "5%"]
    ran = run("auto", *args, "--output", out, *more)
    assert ran.code == 0, ran.err
    assert "nothing is written" in ran.out and not out.exists()
    assert "no window of layers can be had" in ran.err


@pytest.mark.slow
def test_what_comes_nearest_to_the_budget_is_named_and_written_where_that_is_asked_for(
    run: Run, args: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "fused"
    more = ["--profile", "quick", "--max-perplexity-increase", "0.0001%", "--output", out]
    ran = run("auto", *args, *more)
    assert ran.code == 0, ran.err
    assert "the plan that comes nearest (FFN depth 4 -> 3) costs +" in ran.out and "--nearest writes it" in ran.out
    assert "nothing is written" in ran.out and not out.exists()
    ran = run("auto", *args, *more, "--nearest", "--json")
    assert ran.code == 0, ran.err
    assert "it is taken (--nearest)" in ran.json["outside"] and ran.json["depth"]["plan"] == 3
    assert len(plan_of(fxfusion.from_pretrained(out)).groups) == 1

    # A depth that cannot be had: the plan of the least depth.
    ran = run("auto", *args, "--profile", "quick", "--target-depth", 1, "--output", out, "--nearest", "--json")
    assert ran.code == 0, ran.err
    assert "no plan reaches" in ran.json["outside"] and 1 < ran.json["depth"]["plan"] < 4


@pytest.mark.slow
def test_the_quick_profile_merges_a_tenth_where_no_budget_is_given(
    run: Run, args: list[object], tmp_path: Path
) -> None:
    text = args[1:3]
    ran = run("auto", args[0], *text, "--length", LENGTH, "--batch", 8, *args[-2:], "--output", tmp_path / "fused",
              "--profile", "quick", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["depth"] == {"intact": 4, "plan": 3} and ran.json["outside"] is None
    assert ran.json["text"]["sequences"] == 64
    assert [group["mixers"] for group in ran.json["plan"]["groups"]] == ["hoist"]


def test_a_format_that_cannot_hold_a_road_is_known_before_the_model_is_loaded(
    run: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxfusion.cli.inputs.load_model", lambda *_: pytest.fail("it was loaded"))
    more = ["--roads", "hoist,wide", "--format", "nemotron-nas", "--output", tmp_path / "fused"]
    ran = run("auto", *args, *more)
    assert ran.code == 2 and "--roads wide makes cannot be written so" in ran.error


@pytest.mark.parametrize("command", ["auto", "refit", "score", "eval", "plan"])
def test_text_that_is_too_short_is_said_before_the_model_is_loaded(
    run: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("now the model is loaded")

    monkeypatch.setattr("fxfusion.cli.inputs.load_model", stop)
    FusionPlan(groups=[{"members": [1, 2], "mixers": "hoist"}]).save(tmp_path / "plan.yaml")
    more = {
        "auto": ["--output", tmp_path / "fused"],
        "refit": ["--output", tmp_path / "fused", "--plan", tmp_path / "plan.yaml"],
        "plan": ["--drop", 1],
    }.get(command, [])
    ran = run(command, *args, *more, "--sequences", 4000)
    assert ran.error == "now the model is loaded"
    assert "holds 96 sequences of 24 tokens, fewer than the 4000 that are asked for" in ran.err
    ran = run(command, *args, *more, "--sequences", 4000, "--batch", 4000)
    assert "one batch of 4000 rows" in ran.error and "now the model" not in ran.err


def test_text_is_held_out() -> None:
    batches = [torch.full((1, 4), number) for number in range(17)]
    text, held_out = divided(batches)
    assert [int(batch[0, 0]) for batch in held_out] == [0, 8, 16] and len(text) == 14
    with pytest.raises(OptionError, match="2 batches of text are too few"):
        divided(batches[:2])


def test_a_budget_that_held_out_text_does_not_keep_is_named() -> None:
    assert over_budget(None, 10.0, 20.0) is None and over_budget(0.01, 10.0, 10.05) is None
    assert "2.0% above the intact model's, more than the 1.0% asked for" in str(over_budget(0.01, 10.0, 10.2))


def test_a_dry_run_measures_nothing(run: Run, args: list[object], tmp_path: Path) -> None:
    ran = run("auto", *args, "--output", tmp_path / "fused", "--dry-run", "--json")
    assert ran.code == 0 and ran.json["writes"][1] == str(tmp_path / "fused")
    assert not (tmp_path / "fused").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("command", "more", "named"),
    [
        ("auto", [], "--output"),
        ("auto", ["--output", "x", "--roads", "hoist,raise"], "--roads: expected some of drop, hoist, wide, remove"),
        ("auto", ["--output", "x", "--roads", "hoist,remove"], "--roads remove: beside other roads it needs --format"),
        ("auto", ["--output", "x", "--hardware", "abacus"], "--hardware: no device 'abacus'"),
        ("auto", ["--output", "x", "--tp", 3], "tp 3"),
        ("plan", ["--roads", "hoist"], "--roads: they need a budget, one of --max-perplexity-increase"),
        ("plan", ["--automatic", "--drop", 2], "--drop: over several roads"),
        (
            "plan",
            ["--after-refit", "--target-depth", 3],
            "--after-refit: name the roads that it is about, such as --roads hoist",
        ),
        (
            "plan",
            ["--roads", "hoist", "--max-latency", 1],
            "--max-latency: name the device that it is predicted for, such as --hardware h100",
        ),
        ("plan", ["--roads", "hoist", "--target-depth", 3, "--drop-attention", "1"], "--drop-attention: over several"),
        ("plan", ["--roads", "hoist", "--target-depth", 3, "--preset", "paper"], "--preset paper is a rule"),
        ("plan", ["--automatic", "--preset", "paper"], "--automatic and --preset paper"),
    ],
)
def test_what_cannot_be_is_exit_code_2_and_named(
    run: Run, args: list[object], command: str, more: list[object], named: str
) -> None:
    ran = run(command, *args, *more)
    assert ran.code == 2 and named in ran.err and "Traceback" not in ran.err


def test_a_plan_over_roads_is_written_with_what_it_costs(run: Run, args: list[object], tmp_path: Path) -> None:
    more = ["--roads", "drop,hoist", "--target-depth", 3, "--max-window", 2, "--hardware", "h100"]
    ran = run("plan", *args, *more)
    assert ran.code == 0, ran.err
    plan = FusionPlan.load(tmp_path / "results" / "plan.yaml")
    assert len(plan.groups) == 1 and plan.model is not None and plan.made_by is not None
    assert "FFN depth: 4 -> 3" in ran.out and "fxfusion fuse" in ran.out


@pytest.mark.slow
def test_a_nemotron_folder_becomes_another_one(run: Run, args: list[object], tmp_path: Path) -> None:
    fxfusion.save_pretrained(model_of(), tmp_path / "intact", "nemotron-nas")
    more = ["--format", "nemotron-nas", "--target-depth", 3, "--roads", "drop", "--max-window", 2, "--json"]
    ran = run("auto", tmp_path / "intact", *args[1:], "--output", tmp_path / "fused", *more)
    assert ran.code == 0, ran.err
    assert ran.json["depth"] == {"intact": 4, "plan": 3}
    loaded = fxfusion.from_pretrained(tmp_path / "fused")
    assert loaded.config.model_type == "nemotron-nas"
    assert "differs" not in ran.err, "the weights are other ones because they were refitted"
