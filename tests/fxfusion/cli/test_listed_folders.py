"""Commands read folders whose config lists its layers, in the schemas of others, without their code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxfusion
from tests.fxfusion.checkpoints import listed_folders as others
from tests.fxfusion.checkpoints.nemotron_models import ids, logits, off
from tests.fxfusion.cli.conftest import SMALL, Run

SCHEMAS: dict[str, Any] = {
    "nemotron-nas": (others.nemotron, others.LAYERS),
    "anymodel": (others.anymodel, others.ODD),
    "per_layer_config": (others.per_layer, others.ODD),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By schema; and token ids."""
    root = tmp_path_factory.mktemp("listed")
    for name, (config, layers) in SCHEMAS.items():
        others.write(root / name, config(), others.tensors(layers))
    random = torch.Generator().manual_seed(3)
    save_file({"input_ids": torch.randint(3, others.VOCABULARY, (16, 16), generator=random)}, root / "ids.safetensors")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
def test_explain_finds_the_run_from_the_config_alone(schema: str, folders: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text((folders / schema / "config.json").read_text())
    found = run("explain", tmp_path / "m", "--json")
    assert found.code == 0, found.err
    assert "layers.5" in json.dumps(found.json) and "this code was run" not in found.err


@pytest.mark.parametrize("schema", SCHEMAS)
def test_simulate(schema: str, folders: Path, run: Run) -> None:
    plain = run("simulate", folders / schema, "--json")
    fused = run("simulate", folders / schema, "--groups", "1-4", "--json")
    assert plain.code == fused.code == 0, plain.err + fused.err
    assert fused.json["latency_ms"] < plain.json["latency_ms"]


@pytest.mark.slow
@pytest.mark.parametrize("schema", ["anymodel", "per_layer_config"])
def test_score_plan_fuse_and_eval(schema: str, folders: Path, tmp_path: Path, run: Run) -> None:
    text = ("--text", folders / "ids.safetensors", "--results", tmp_path / "r", *SMALL)
    scored = run("score", folders / schema, *text, "--json")
    assert scored.code == 0, scored.err
    fxfusion.FusionPlan(groups=[[1, 2, 3, 4]], norm="last").save(tmp_path / "plan.yaml")
    more = ("--plan", tmp_path / "plan.yaml", "--output", tmp_path / "out")
    assert "anymodel" in run("fuse", folders / schema, *more).error, "there is no canonical form"
    fused = run("fuse", folders / schema, *more, "--format", "anymodel", "--json")
    assert fused.code == 0, fused.err
    assert len(fxfusion.from_pretrained(tmp_path / "out").model.layers) == 6
    measured = run("eval", tmp_path / "out", "--text", folders / "ids.safetensors", "--results", tmp_path / "e", *SMALL)
    assert measured.code == 0, measured.err


@pytest.mark.slow
@pytest.mark.parametrize("schema", ["nemotron-nas", "anymodel"])
def test_refit_takes_what_was_loaded_as_intact(schema: str, folders: Path, tmp_path: Path, run: Run) -> None:
    """Attention that the folder has not was not dropped: nothing else than the folder's model is to be restored."""
    fxfusion.FusionPlan(groups=[[1, 2, 3, 4]], norm="last").save(tmp_path / "plan.yaml")
    given = ("--plan", tmp_path / "plan.yaml", "--text", folders / "ids.safetensors", "--results", tmp_path / "r")
    more = ("--output", tmp_path / "out", "--format", "anymodel", "--length", 16, "--batch", 4, "--sequences", 16)
    found = run("refit", folders / schema, *given, *more)
    assert found.code == 0, found.err
    again = fxfusion.from_pretrained(tmp_path / "out")
    assert len(again.model.layers) == 6
    layers = SCHEMAS[schema][1]
    assert off(logits(again), others.eager(layers, others.tensors(layers), ids())) > 1e-6


@pytest.mark.parametrize("command", ["explain", "simulate"])
def test_what_is_not_understood_stops_by_name(command: str, tmp_path: Path, run: Run) -> None:
    config = others.anymodel()
    config["block_configs"][3]["ffn"]["moe"] = {"num_local_experts": 4}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "block_configs[3].ffn.moe = " in run(command, tmp_path / "m").error
