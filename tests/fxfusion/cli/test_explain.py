"""`fxfusion explain`: exit codes, output, and a quick start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxfusion.cli.explain import read_policy
from tests.fxfusion.cli.conftest import Ran, Run

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS = ["full_attention", "mlp", "mlp", "full_attention", "mlp", "mlp", "mlp"]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are attention or FFN alone: chains 1-2 and 4-6, without any surgery."""
    fields = {"model_type": "nemotron_h", "layers_block_type": LAYERS, "num_hidden_layers": 7, "head_dim": 16}
    return written(tmp_path_factory.mktemp("hybrid"), fields)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with attention in both of its layers."""
    return written(tmp_path_factory.mktemp("ordinary"), {"model_type": "llama", "num_hidden_layers": 2})


def written(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({**TINY, **fields}))
    return folder


def groups_of(ran: Ran) -> list[list[str]]:
    found = ran.json["graphs"][0]["groups"]
    return [[member["layer"].rpartition(".")[2] for member in group["members"]] for group in found]


def test_what_would_be_fused_is_printed(run: Run, hybrid: Path, tmp_path: Path) -> None:
    ran = run("explain", hybrid, "--output", tmp_path / "r.html")
    assert ran.code == 0
    assert ran.out.startswith("5 of 5 FFNs fused into 2")
    assert "model.layers.4-6" in ran.out and f"written: {tmp_path / 'r.html'}" in ran.out
    assert hybrid.name in (tmp_path / "r.html").read_text("utf-8")


def test_nothing_to_fuse_is_exit_code_3_with_reasons(run: Run, ordinary: Path) -> None:
    ran = run("explain", ordinary)
    assert ran.code == 3
    assert ran.out.startswith("Nothing to fuse: 2 FFNs found") and "alone" in ran.out


def test_json_is_the_report_and_nothing_else(run: Run, hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSION_DEBUG", "2")  # prints lines, which must not get in between
    ran = run("explain", hybrid, "--json", "--length", 4, "--batch", 2)
    assert ran.code == 0 and "fxfusion: " in ran.err
    assert set(ran.json) == {"summary", "graphs", "notes"}
    assert groups_of(ran) == [["1", "2"], ["4", "5", "6"]]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (["--policy", "paper"], [["4", "5"]]),
        (["--policy", '{"max_members": 2}'], [["1", "2"], ["4", "5"]]),
        (["--groups", "1-2", "--groups", "5,6"], [["1", "2"], ["5", "6"]]),
        (["--groups", "4-5"], [["4", "5"]]),
    ],
)
def test_policies_and_plans_choose(run: Run, hybrid: Path, options: list[str], groups: list[list[str]]) -> None:
    ran = run("explain", hybrid, "--json", *options)
    assert ran.code == 0 and groups_of(ran) == groups


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--policy", "biggest"], "biggest"),
        (["--policy", '{"keep_last": '], "--policy"),
        (["--policy", '{"keep_lost": 1}'], "keep_lost"),
        (["--groups", "4-x"], "4-x"),
        (["--groups", "6-4"], "backwards"),
        (["--groups", "4"], "at least two"),
        (["--groups", "4-5", "--groups", "5-6"], "5"),
        (["--groups", "4-5", "--policy", "paper"], "--groups"),
        (["--length", "0"], "--length"),
        (["--colour"], "--colour"),
    ],
)
def test_a_wrong_option_is_exit_code_2_and_named(run: Run, hybrid: Path, args: list[str], named: str) -> None:
    ran = run("explain", hybrid, *args)
    assert ran.code == 2 and named in ran.err and ran.out == ""
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "no such folder"),
        ("", "no config.json"),
        ("{not json", "config.json"),
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "vit"}', "pixel_values"),
    ],
)
def test_a_folder_that_is_no_model_is_exit_code_1_in_one_line(
    run: Run, tmp_path: Path, config: str | None, named: str
) -> None:
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
    if config:
        (folder / "config.json").write_text(config)
    ran = run("explain", folder)
    assert ran.code == 1 and named in ran.err and ran.out == ""
    assert ran.err.strip().startswith("fxfusion: error: ") and len(ran.err.strip().splitlines()) == 1


def test_the_traceback_is_shown_on_request(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSION_DEBUG", "1")
    ran = run("explain", tmp_path)
    assert ran.code == 1 and "Traceback" in ran.err and ran.err.strip().splitlines()[-1].startswith("fxfusion: error")


def test_read_policy() -> None:
    assert read_policy(None) is None
    assert read_policy("paper") == "paper"
    assert read_policy(' {"keep_last": 1}') == {"keep_last": 1}
