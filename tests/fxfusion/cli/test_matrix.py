from __future__ import annotations

from pathlib import Path

import pytest

from fxfusion.analysis.dependency import DependencyMatrix
from tests.fxfusion.cli.conftest import LAYERS, SMALL, Run


@pytest.fixture
def args(model: Path, text: Path, results: Path) -> list[object]:
    return ["matrix", model, "--text", text, "--results", results, *SMALL]


def test_a_matrix_is_kept_with_its_heat_maps(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args, "--drop-attention", "1-2", "--json")
    assert ran.code == 0, ran.err
    folder = results / "matrix_1_2"
    kept = DependencyMatrix.load(folder)
    assert kept.values.tolist() == ran.json["values"] and kept.dropped_attention == (1, 2)
    assert len(ran.json["layers"]) == LAYERS and ran.json["unit"] == "ffn"
    assert (folder / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "heat_map.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_blocks_have_a_folder_of_their_own_and_are_told_by_pairs(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args, "--unit", "block")
    values = DependencyMatrix.load(results / "matrix_block").values
    assert f"{float(values.max()):.5f}" in ran.out and "dependency of" in ran.out
    assert DependencyMatrix.load(results / "matrix_block").unit == "block"


@pytest.mark.parametrize(
    ("layers", "named"), [("7", r"no attention to drop in layers \[7\]"), ("2-1", "runs backwards"), ("x", "'x'")]
)
def test_layers_that_are_not_there_are_named(run: Run, args: list[object], layers: str, named: str) -> None:
    ran = run(*args, "--drop-attention", layers)
    assert ran.code == 2
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(ran.error)


def test_a_dry_run_makes_no_folder(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args, "--dry-run", "--json")
    assert ran.json["work"] == [{"what": "dependency matrix (ffn)", "passes": LAYERS + 1, "known": ""}]
    assert not (results / "matrix_").exists()
