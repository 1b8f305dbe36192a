"""`fxfusion fuse`, `unfuse`, `export`, `check`, `generate`: a folder in, a folder out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fxfusion
from tests.fxfusion.cli.conftest import Run, call

PLAN = {"dropped_attention": [1, 2], "groups": [[0, 1, 2]]}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    fxfusion.FusionPlan(**PLAN).save(file)
    return file


@pytest.fixture(scope="module")
def fused(model: Path, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canonical folder: not to be changed."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    assert call("fuse", model, "--output", folder, "--plan", plan) == 0
    return folder


@pytest.fixture(scope="module")
def exported(fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert call("export", fused, "--output", folder) == 0
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_canonical_folder_keeps_every_weight_and_loads_fused(model: Path, fused: Path) -> None:
    before, after = weights(model), weights(fused)
    assert after.keys() == before.keys()
    attention = [name for name in before if ".1.self_attn." in name or ".2.self_attn." in name]
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in (1, 2)]
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {*attention, *norms})
    assert not any(after[name].any() for name in (*attention, *norms))
    loaded = fxfusion.from_pretrained(fused)
    assert len(loaded.model.layers) == 1 and loaded.model.layers[0].mlp.gate_proj.out_features == 120
    wanted = fxfusion.fuse(AutoModelForCausalLM.from_pretrained(model), PLAN)
    assert torch.allclose(logits(loaded), logits(wanted), atol=1e-5)


def test_unfuse_gives_the_weights_without_groups(run: Run, fused: Path, tmp_path: Path) -> None:
    ran = run("unfuse", fused, "--output", tmp_path / "out", "--json")
    assert ran.code == 0 and ran.json["after"]["groups"] == [] and ran.json["after"]["layers"] == 3
    before, after = weights(fused), weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = run("unfuse", tmp_path / "out", "--output", tmp_path / "more")
    assert again.code == 1 and "nothing is fused in it" in again.error


def test_export_writes_what_engines_load(run: Run, fused: Path, exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and config["num_hidden_layers"] == 1
    loaded = fxfusion.from_pretrained(exported)
    assert torch.allclose(logits(loaded), logits(fxfusion.from_pretrained(fused)), atol=1e-5)


def test_fuse_straight_into_the_engines_format(
    run: Run, model: Path, plan: Path, exported: Path, tmp_path: Path
) -> None:
    ran = run("fuse", model, "--output", tmp_path / "out", "--plan", plan, "--format", "nemotron-nas", "--json")
    assert ran.code == 0 and (ran.json["before"]["layers"], ran.json["after"]["layers"]) == (3, 1)
    ours, theirs = weights(tmp_path / "out"), weights(exported)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow  # 10 s: fuses twice
def test_fuse_straight_into_the_format_of_transformers(run: Run, model: Path, plan: Path, tmp_path: Path) -> None:
    words = ("fuse", model, "--plan", plan, "--format", "transformers", "--output")
    dry, ran = run(*words, tmp_path / "dry", "--dry-run", "--json"), run(*words, tmp_path / "out")
    assert dry.code == ran.code == 0 and (dry.json["before"]["layers"], dry.json["after"]["layers"]) == (3, 1)
    said = ran.out.partition("in transformers:\n")[2]
    folder = tmp_path / "out"
    assert f'AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)' in said
    assert f'LLM("{folder}", model_impl="transformers", trust_remote_code=True)' in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert dry.json["export"]["per_layer_config"] == config["per_layer_config"] and not (tmp_path / "dry").exists()
    assert config["per_layer_config"] == {"0": {"intermediate_size": 120}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card and 'model_impl="transformers"' in card
    refused = run("fuse", model, "--plan", plan, "--format", "safetensors", "--output", tmp_path / "no")
    assert refused.code != 0 and not (tmp_path / "no").exists()


def test_a_dry_run_of_a_folder_for_engines(run: Run, exported: Path, tmp_path: Path) -> None:
    """It holds the fused form itself: its plan is not fused a second time."""
    ran = run("export", exported, "--output", tmp_path / "out", "--dry-run", "--json")
    assert ran.code == 0 and ran.json["before"]["layers"] == ran.json["after"]["layers"]


@pytest.mark.parametrize("command", ["fuse", "export"])
def test_a_dry_run_reads_no_weights_and_writes_nothing(
    run: Run, model: Path, plan: Path, tmp_path: Path, command: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    ran = run(command, bare, "--output", tmp_path / "out", "--plan", plan, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["before"]["layers"], ran.json["after"]["layers"]) == (3, 1)
    assert not (tmp_path / "out").exists()
    if command == "export":
        assert ran.json["export"]["config"]["block_configs"][0]["ffn"]["ffn_mult"] == 1.5 * 256 / 32
        assert ran.json["export"]["engines"]["mlx-lm"] is None


def test_check_passes_on_good_folders(run: Run, model: Path, fused: Path, exported: Path) -> None:
    for folder, checks in ((model, 4), (fused, 5), (exported, 5)):
        ran = run("check", folder, "--json")
        assert ran.code == 0 and ran.json["good"] and len(ran.json["checks"]) == checks
    assert ran.json["engines"]["vllm"] is None


def test_unfuse_takes_a_folder_for_engines_apart(run: Run, fused: Path, exported: Path, tmp_path: Path) -> None:
    ran = run("unfuse", exported, "--output", tmp_path / "out", "--json")
    assert ran.code == 0 and ran.json["after"]["layers"] == 3 and ran.json["after"]["groups"] == []
    before, after = weights(fused), weights(tmp_path / "out")
    assert all(torch.allclose(after[name], before[name], rtol=1e-6, atol=0) for name in before)
    folder = Path(shutil.copytree(exported, tmp_path / "folder"))
    (folder / "fxfusion_residue.st").write_bytes(b"other")
    ran = run("check", folder)
    assert ran.code == 1 and "fxfusion_residue.st is cut off or was changed" in ran.out
    ran = run("unfuse", folder, "--output", tmp_path / "more")
    assert ran.code == 1 and "fxfusion_residue.st is cut off or was changed" in ran.error


def test_a_dry_run_of_what_only_reads(run: Run, fused: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fused, tmp_path / "folder"))
    (folder / "model.safetensors").unlink()
    ran = run("check", folder, "--dry-run", "--json")
    assert ran.code == 0 and ran.json["would_check"] == ["files", "loads", "computes", "cache", "fused"]
    ran = run("generate", folder, "--prompt", "3 4 5", "--dry-run", "--json")
    assert ran.code == 0 and ran.json["texts"] == [{"prompt": "3 4 5", "prompt_tokens": 3}]
    assert (ran.json["before"]["layers"], ran.json["after"]["layers"]) == (3, 1)
    assert run("generate", folder, "--prompt", "3 4 5").code == 1


def test_check_names_what_is_wrong(run: Run, fused: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fused, tmp_path / "folder"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-64])
    ran = run("check", folder, "--json")
    assert ran.code == 1 and not ran.json["good"] and "model.safetensors" in ran.json["checks"][0]["detail"]
    found = weights(fused)
    found["model.norm.weight"][0] = float("nan")
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    ran = run("check", folder)
    assert ran.code == 1 and "FAIL  computes: logits of 14 tokens are not finite" in ran.out


def test_generate_continues_prompts(run: Run, fused: Path, exported: Path, model: Path, plan: Path) -> None:
    shared = ("--prompt", "3 4 5", "--new-tokens", 6, "--json")
    texts = [run("generate", folder, *shared).json["texts"][0]["tokens"] for folder in (fused, exported)]
    texts.append(run("generate", model, "--plan", plan, *shared).json["texts"][0]["tokens"])
    texts.append(run("generate", fused, "--cache", "static", *shared).json["texts"][0]["tokens"])
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(texts[0]) == 6
    intact = run("generate", model, *shared).json["texts"][0]["tokens"]
    assisted = run("generate", model, "--draft", fused, *shared).json["texts"][0]["tokens"]
    assert assisted == intact


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("fuse", "MODEL", "--output", "OUT"), 2, "Missing option '--plan'"),
        (("fuse", "MODEL", "--output", "OUT", "--plan", "WRONG"), 2, "layer 7 does not exist"),
        (("fuse", "OUT", "--output", "OUT", "--plan", "PLAN"), 1, "no such folder"),
        (("export", "OUT", "--output", "OUT"), 1, "no such folder"),
        (("check", "OUT"), 1, "no such folder"),
        (("unfuse", "MODEL", "--output", "OUT"), 1, "nothing says what was fused"),
        (("generate", "MODEL"), 2, "--prompt: give the text"),
        (("generate", "MODEL", "--prompt", "3", "--cache", "paged"), 2, "'dynamic', 'static'"),
    ],
)
def test_wrong_use_says_what_is_wrong(
    run: Run, model: Path, plan: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, why: str
) -> None:
    wrong = tmp_path / "wrong.yaml"
    fxfusion.FusionPlan(dropped_attention=[7]).save(wrong)
    names = {"MODEL": model, "OUT": tmp_path / "out", "PLAN": plan, "WRONG": wrong}
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    ran = run(*(names.get(argument, argument) for argument in arguments))
    assert ran.code == code and why in ran.err
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def measured(folder: Path, plan: dict[str, Any]) -> Path:
    """A results folder as `fxfusion eval` leaves it."""
    estimate = {"value": 21.29, "low": 20.18, "high": 22.47}
    contents = {"groups": plan["groups"], "dropped_attention": plan["dropped_attention"], "norm": "fold"}
    latest = {
        "plan_contents": contents,
        "text": {"tokens": 4096, "sources": ["/corpus/held_out.txt"]},
        "quality": {"intact model": {"perplexity": estimate, "kl": None}, "fused": {"perplexity": estimate}},
    }
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps({"latest": latest, "kept": {}}))
    return folder


def test_what_was_measured_goes_into_the_card(run: Run, fused: Path, tmp_path: Path) -> None:
    results = measured(tmp_path / "results", PLAN)
    ran = run("export", fused, "--output", tmp_path / "out", "--results", results)
    assert ran.code == 0, ran.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| perplexity, fused | 21.29 [20.18, 22.47] |" in card and "4,096 tokens of held_out.txt" in card


def test_measurements_of_another_plan_are_refused(run: Run, model: Path, plan: Path, tmp_path: Path) -> None:
    results = measured(tmp_path / "results", {"dropped_attention": [1], "groups": [[0, 1]]})
    ran = run("fuse", model, "--output", tmp_path / "out", "--plan", plan, "--results", results)
    assert ran.code == 2 and "another plan" in ran.error
    (tmp_path / "none").mkdir()
    ran = run("fuse", model, "--output", tmp_path / "out", "--plan", plan, "--results", tmp_path / "none")
    assert ran.code == 2 and "run `fxfusion eval` with it first" in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_layers_are_removed_by_commands(run: Run, model: Path, tmp_path: Path) -> None:
    file, both = tmp_path / "removed.yaml", tmp_path / "both.yaml"
    fxfusion.FusionPlan(removed=[1]).save(file)
    fxfusion.FusionPlan(removed=[1], dropped_attention=[2]).save(both)
    for more in (["--dry-run"], []):
        ran = run("fuse", model, "--plan", file, "--output", tmp_path / "smaller", "--json", *more)
        assert ran.code == 0, ran.err
        assert ran.json["after"]["layers"] == ran.json["before"]["layers"] - 1 and ran.json["after"]["removed"] == [1]
    shown = run("fuse", model, "--plan", file, "--output", tmp_path / "again")
    assert "removed: layers 1" in shown.out
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").model.layers) == 2
    refused = run("fuse", model, "--plan", both, "--output", tmp_path / "both", "--dry-run")
    assert refused.code != 0 and "layers [1] were removed, and others fused or left without attention" in refused.error


@pytest.mark.slow
def test_an_export_is_quantised(run: Run, fused: Path, tmp_path: Path) -> None:
    given = ["export", fused, "--output", tmp_path / "out", "--quantize", "int4"]
    ran = run(*given, "--group-size", 24)
    assert ran.code == 2 and "q_proj has 32 inputs, which are no whole groups of 24" in ran.error
    ran = run(*given[:-2], "--group-size", 16)
    assert ran.code == 2 and "--group-size is of quantize" in ran.error
    ran = run("export", fused, "--quantize", "int8", "--format", "gguf", "--output", tmp_path / "out.gguf")
    assert ran.code != 0 and "not of format gguf" in ran.error and not any(tmp_path.iterdir())
    ran = run(*given, "--group-size", 16)
    assert ran.code == 0, ran.err
    assert weights(tmp_path / "out")["model.layers.0.mlp.up_proj._weight_scale"].shape[1] == 2
