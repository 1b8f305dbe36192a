"""`fxfusion score`, `matrix` and `sweep`, and what all measuring commands share: errors, JSON, dry runs, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.cli.measure import show_scores
from fxfusion.cli.screen import Screen
from fxfusion.files import RECORD
from tests.fxfusion.cli.conftest import LAYERS, SMALL, Run, make_model


@pytest.fixture
def args(model: Path, text: Path, results: Path) -> list[object]:
    """A command whose scores are there already."""
    return ["score", model, "--text", text, "--results", results, *SMALL]


@pytest.fixture
def matrix_args(args: list[object]) -> list[object]:
    return ["matrix", *args[1:]]


@pytest.fixture
def sweep_args(args: list[object]) -> list[object]:
    return ["sweep", *args[1:]]


def test_scores_are_shown_by_layer_with_bars_and_kept(run: Run, args: list[object], results: Path) -> None:
    ran = run(*args)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines[1 : LAYERS + 1]] == [str(layer) for layer in range(LAYERS)]
    kept = json.loads((results / "scores_loss.json").read_text())
    values = {score["layer"]: score["value"] for score in kept["scores"]}
    cheapest, dearest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    assert "cheapest" in lines[1 + cheapest] and ran.out.count("cheapest") == 1
    assert f" {LAYERS} " in lines[1 + dearest] and f"{values[dearest]:.5f}" in lines[1 + dearest]
    assert "\x1b" not in ran.out + ran.err
    assert kept["text"]["tokens"] == 8 * 16


def test_bars_are_as_long_as_scores_are_high(capsys: pytest.CaptureFixture[str]) -> None:
    from fxfusion.analysis.intervals import Estimate
    from fxfusion.analysis.scores import AttentionScores, LayerScore

    def lines(*values: float) -> list[str]:
        scores = tuple(LayerScore(n, "", Estimate(value, value, value), None) for n, value in enumerate(values))
        show_scores(AttentionScores("loss", scores, 100, 10), Screen())
        return capsys.readouterr().out.splitlines()[1 : len(values) + 1]

    assert [line.count("█") for line in lines(1.0, 0.5, -0.2, 2.0)] == [12, 6, 0, 24]
    assert [line.count("█") for line in lines(-1.0, -2.0)] == [0, 0]


def test_a_second_run_measures_nothing_again(run: Run, args: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.models.traced import TracedGraph

    monkeypatch.setattr(TracedGraph, "run", lambda *_, **__: pytest.fail("the model was run again"))
    monkeypatch.setenv("FXFUSION_DEBUG", "2")  # prints lines, which must not get between those of the JSON
    ran = run(*args, "--json")
    assert ran.json["method"] == "loss" and "fxfusion: " in ran.err
    with pytest.raises(pytest.fail.Exception):
        run(*args, "--greedy")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cosine", "kl"])
def test_greedy_runs_tell_what_the_drops_cost_together(run: Run, args: list[object], method: str) -> None:
    ran = run(*args, "--method", method, "--greedy")
    assert "greedy turn" in ran.out and "cost of all so far" in ran.out
    found = run(*args, "--json", "--method", method, "--greedy").json
    assert found["method"] == method and len(found["steps"]) == LAYERS


def test_a_dry_run_measures_and_writes_nothing(run: Run, args: list[object], results: Path, tmp_path: Path) -> None:
    before = contents_of(results)
    for more, passes, known in (
        ((), LAYERS + 1, "known"),
        (("--results", tmp_path / "new", "--method", "cosine"), 1, ""),
    ):
        ran = run(*args, "--dry-run", "--json", *more)
        assert ran.code == 0 and [(part["passes"], part["known"]) for part in ran.json["work"]] == [(passes, known)]
    assert ran.json["text"]["sequences"] == 8 and ran.json["text"]["tokens"] == 128
    assert contents_of(results) == before and not (tmp_path / "new").exists()
    ran = run(*args, "--dry-run", "--seed", 1)  # other text than that of the scores
    assert "nothing is measured or written" in ran.out and "begun" in ran.out


def contents_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (["--text", "none.txt"], 2, "--text: there is no file or folder none.txt"),
        (["--length", 500], 2, "smaller length or batch"),
        (["--length", 5000], 2, "--length 5000: the model reads 2048 tokens at most"),
        (["--device", "tpu9"], 2, "--device tpu9"),
        (["--results", "/dev/null/x"], 1, "--results /dev/null/x: cannot be made"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    run: Run, args: list[object], change: list[object], code: int, named: str
) -> None:
    ran = run(*args, *change)
    assert ran.code == code and named in ran.error and ran.out == ""


def test_no_text_and_no_model_are_errors_that_say_what_to_do(run: Run, model: Path, text: Path) -> None:
    ran = run("score", model)
    assert ran.code == 2 and "--text: name a text file" in ran.error
    ran = run("score", "/nowhere", "--text", text)
    assert ran.code == 1 and "/nowhere: no such folder" in ran.error


def test_results_of_another_model_or_text_are_left_alone(
    run: Run, args: list[object], results: Path, tmp_path: Path
) -> None:
    before = contents_of(results)
    other = make_model(tmp_path / "other", seed=1)
    for ran, named in (
        (run("score", other, *args[2:]), "another model ("),
        (run(*args, "--dtype", "bfloat16"), "another precision (float32)"),
    ):
        assert ran.code == 1 and named in ran.error and "--results" in ran.error
    ran = run(*args, "--seed", 1)
    assert ran.code == 2 and "other text" in ran.error
    assert contents_of(results) == before


@pytest.mark.parametrize("name", ["scores.json", "model.json"])
def test_a_broken_file_is_named(run: Run, args: list[object], results: Path, name: str) -> None:
    (results / name).write_text("{")
    ran = run(*args)
    assert ran.code in (1, 2) and name in ran.error


# --- matrix ------------------------------------------------------------------------------------------


def test_a_matrix_is_kept_with_its_heat_maps(run: Run, matrix_args: list[object], results: Path) -> None:
    ran = run(*matrix_args, "--drop-attention", "1-2", "--json")
    assert ran.code == 0, ran.err
    folder = results / "matrix_1_2"
    kept = DependencyMatrix.load(folder)
    assert kept.values.tolist() == ran.json["values"] and kept.dropped_attention == (1, 2)
    assert len(ran.json["layers"]) == LAYERS and ran.json["unit"] == "ffn"
    assert (folder / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "heat_map.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_blocks_have_a_folder_of_their_own_and_are_told_by_pairs(
    run: Run, matrix_args: list[object], results: Path
) -> None:
    ran = run(*matrix_args, "--unit", "block")
    values = DependencyMatrix.load(results / "matrix_block").values
    assert f"{float(values.max()):.5f}" in ran.out and "dependency of" in ran.out
    assert DependencyMatrix.load(results / "matrix_block").unit == "block"


@pytest.mark.parametrize(
    ("layers", "named"), [("7", r"no attention to drop in layers \[7\]"), ("2-1", "runs backwards"), ("x", "'x'")]
)
def test_layers_that_are_not_there_are_named(run: Run, matrix_args: list[object], layers: str, named: str) -> None:
    ran = run(*matrix_args, "--drop-attention", layers)
    assert ran.code == 2
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(ran.error)


def test_a_dry_run_of_a_matrix_makes_no_folder(run: Run, matrix_args: list[object], results: Path) -> None:
    ran = run(*matrix_args, "--dry-run", "--json")
    assert ran.json["work"] == [{"what": "dependency matrix (ffn)", "passes": LAYERS + 1, "known": ""}]
    assert not (results / "matrix_").exists()


# --- sweep -------------------------------------------------------------------------------------------


def test_every_depth_is_in_the_table_the_plot_and_the_json(run: Run, sweep_args: list[object], results: Path) -> None:
    ran = run(*sweep_args, "--drops", "0,3", "--json")
    assert ran.code == 0, ran.err
    points = ran.json["points"]
    assert {len(point["dropped_attention"]) for point in points} == {0, 3}
    assert {point["depth"] for point in points} == {1, 2, 3} and any(point["on_front"] for point in points)
    with (results / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["depth"]) for row in rows] == [point["depth"] for point in points]
    assert json.loads((results / "sweep.json").read_text())["points"] == points
    assert "<svg" in (results / "sweep.svg").read_text()
    assert [file.name for file in results.iterdir() if file.name.startswith(".")] == [RECORD]


@pytest.mark.slow
def test_a_second_sweep_measures_only_what_is_new_and_shows_the_front(
    run: Run, sweep_args: list[object], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfusion.analysis import meter

    first = run(*sweep_args, "--drops", "2")
    assert first.code == 0 and " *" in first.out and "sweep.csv" in first.out
    monkeypatch.setattr(meter, "evaluate", lambda *_, **__: pytest.fail("a plan was measured again"))
    assert run(*sweep_args, "--drops", "2").out == first.out
    with pytest.raises(pytest.fail.Exception):
        run(*sweep_args, "--drops", "3")


@pytest.mark.parametrize(("drops", "named"), [("two", "--drops"), ("9", "9 attention layers"), ("2-0", "backwards")])
def test_wrong_numbers_are_named(run: Run, sweep_args: list[object], drops: str, named: str) -> None:
    ran = run(*sweep_args, "--drops", drops)
    assert ran.code == 2 and named in ran.error and ran.out == ""


def test_a_setting_without_hardware_is_named(run: Run, sweep_args: list[object]) -> None:
    ran = run(*sweep_args, "--tp", 8)
    assert ran.code == 2 and "--tp: name the device that it is about, such as --hardware h100" in ran.error


@pytest.mark.slow
def test_a_sweep_over_roads_has_a_plan_for_every_depth(run: Run, sweep_args: list[object], results: Path) -> None:
    args = [*sweep_args, "--roads", "hoist,drop", "--max-window", 3]
    ran = run(*args, "--json")
    assert ran.code == 0, ran.err
    assert [point["depth"] for point in ran.json["points"]] == [1, 2, 3]
    with (results / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["groups"] == "" and rows[0]["groups"].startswith("0 1 2")
    for point, row in zip(ran.json["points"], rows, strict=True):
        assert ("hoist" in row["groups"]) == any(isinstance(group, dict) for group in point["groups"])
    dry = run(*args, "--dry-run", "--json").json
    assert [part["what"] for part in dry["work"]][0] == "loss of each window alone"
    wrong = run(*sweep_args, "--roads", "hoist", "--drops", "1")
    assert wrong.code == 2 and "--drops: over several roads the planner itself decides that" in wrong.error


# --- Ctrl-C -------------------------------------------------------------------------------------------

# The command line, interrupted as by Ctrl-C right after it has written what is measured so far: at once, and only once.
INTERRUPTED = """
import os, signal
from fxfusion.analysis import store
from fxfusion.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
store._SECONDS_BETWEEN_WRITES = store._SHARE_OF_TIME = 0
save = store.Store.save

def saved(self):
    save(self)
    store.Store.save = save
    os.kill(os.getpid(), signal.SIGINT)

store.Store.save = saved
main()
"""


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_goes_on_to_the_same_numbers(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    """A child process is interrupted in the middle of the measurement, twice."""
    args: list[object] = ["score", model, "--text", text, *SMALL, "--greedy"]
    results = tmp_path / "results"
    sizes = []
    for _ in range(2):
        command = [sys.executable, "-c", INTERRUPTED, *map(str, args), "--results", str(results)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == "", done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("fxfusion: error: interrupted") and str(results) in last
        assert "Traceback" not in done.stderr and not (results / "scores_loss_greedy.json").exists()
        assert [name for name in os.listdir(results) if name.startswith(".")] == [RECORD]
        sizes.append(measured(results))
    assert 0 < sizes[0] < sizes[1]
    resumed, anew = (run(*args, "--json", "--results", where).json for where in (results, tmp_path / "anew"))
    assert sizes[1] < measured(results)
    assert resumed == anew


def measured(results: Path) -> int:
    """How many numbers are kept."""
    return sum(map(len, json.loads((results / "scores.json").read_text())["values"].values()))
