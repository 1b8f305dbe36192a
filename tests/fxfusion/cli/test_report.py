"""`fxfusion report`, and `collect`: what is in the results folder becomes what the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.cli.report import collect
from fxfusion.cli.results_folder import ResultsFolder
from fxfusion.errors import FxFusionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.comparison import Cell, Comparison, Entrant
from tests.fxfusion.cli.conftest import LAYERS, Run


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


QUALITY = {name: estimate(1.0) for name in ("loss", "perplexity", "kl", "top1", "top5", "loss_increase")}
PLAN = FusionPlan(groups=[[1, 2]], dropped_attention=[2])
SAMPLE = {"prompt": [2, 3], "reference": [4, 5], "model": [4, 6], "agreed": 1}
TEXTS = {"prompt_text": "2 3", "reference_text": "4 5", "model_text": "4 6"}


def latest(**more: Any) -> dict[str, Any]:
    quality = {"intact model": QUALITY, "fused": {**QUALITY, "loss": estimate(2.0)}}
    return {"quality": quality, "plan": "p.yaml", "plan_contents": None, **more}


@pytest.fixture
def folder(results: Path) -> ResultsFolder:
    return ResultsFolder(results)


def test_a_page_of_scores_alone_names_what_is_missing(run: Run, results: Path) -> None:
    ran = run("report", "--results", results, "--title", "My model")
    assert ran.code == 0 and ran.out.strip() == f"written: {results / 'report.html'}"
    page = (results / "report.html").read_text()
    assert "My model" in page and "fxfusion plan" in page and "fxfusion eval" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_json_holds_what_the_page_shows(run: Run, results: Path, tmp_path: Path) -> None:
    ran = run("report", "--results", results, "--output", tmp_path / "p.html", "--json")
    assert ran.json["page"] == str(tmp_path / "p.html") and (tmp_path / "p.html").is_file()
    kept = json.loads((results / "scores_loss.json").read_text())["scores"]
    layers = ran.json["results"]["layers"]
    assert [layer["score"]["value"] for layer in layers] == [score["value"] for score in kept]
    assert [layer["width"] for layer in layers] == [40] * LAYERS


def test_layers_are_marked_by_the_plan(folder: ResultsFolder) -> None:
    PLAN.save(folder.file("plan.yaml"))
    found = collect(folder)
    assert [layer.mixer for layer in found.layers] == ["kept", "kept", "dropped"]
    assert [layer.group for layer in found.layers] == [None, 0, 0]
    assert found.plan is not None and found.plan.groups == ((1, 2),) and "groups:" in found.plan.yaml
    assert found.model is not None and found.model.layers == LAYERS and found.model.parameters > 0
    assert found.score_method == "loss"


def test_attention_that_a_window_moves_is_marked(folder: ResultsFolder) -> None:
    FusionPlan(groups=[{"members": [0, 1], "mixers": "hoist"}]).save(folder.file("plan.yaml"))
    found = collect(folder)
    assert [layer.mixer for layer in found.layers] == ["kept", "moved", "kept"]
    assert found.plan is not None and found.plan.mixers == ("hoist",)


def test_quality_speed_and_text_are_those_of_the_last_evaluation(folder: ResultsFolder) -> None:
    speed = {"1 token a call": {"fused_against": {"unfused": estimate(2.0)}, "control": estimate(1.0)}}
    more = {"speed": speed, "generation": {"samples": [SAMPLE | TEXTS, SAMPLE | dict.fromkeys(TEXTS)]}}
    folder.write("quality.json", {"latest": latest(**more), "kept": {}})
    found = collect(folder)
    assert [row.name for row in found.quality] == ["intact model", "fused"]
    assert found.quality[1].loss is not None and found.quality[1].loss.value == 2.0
    assert found.speed[0].name == "1 token a call, against the same model without fusing"
    assert found.speed[0].ratio.value == 2.0
    assert (found.samples[0].text, found.samples[0].agreeing) == ("4 6", 1) and found.samples[1].prompt == "2 3"


def test_probes_are_those_of_the_last_evaluation(folder: ResultsFolder) -> None:
    kept = {"copy": 0.5, "add": None, "all": 0.5}
    more = latest(probes={"fused": {"solved": {}, "share": 0.5, "kept": kept}})
    folder.write("quality.json", {"latest": more, "kept": {}})
    (row,) = collect(folder).probes
    assert row.name == "fused" and dict(row.solved) == kept


def test_a_comparison_is_shown_cell_by_cell(folder: ResultsFolder) -> None:
    entrant = Entrant("hoist", FusionPlan(groups=[{"members": [0, 1], "mixers": "hoist"}]))
    common: dict[str, Any] = {"method": "hoist", "depth": 2, "entrant": entrant, "ffns": 2, "latency_ms": 1.5}
    cells = (
        Cell(**common, repaired=False, quality=QUALITY | {"kl": estimate(0.5)}, probes={"copy": 0.5, "all": 0.5}),
        Cell(**common, repaired=True, quality=QUALITY | {"kl": estimate(0.25)}),
        Cell(method="pairs", depth=1, repaired=False, problem="too few layers"),
    )
    found = Comparison(cells=cells, ffns=3, latency_ms=2.0, predicted_for="H100", tokens=(30, 10))
    folder.write("comparison.json", found.to_dict())
    shown = collect(folder).comparison
    assert shown is not None and (shown.ffns, shown.latency_ms, shown.tokens) == (3, 2.0, (30, 10))
    raw, refitted, absent = shown.entries
    assert raw.kl is not None and raw.kl.value == 0.5 and raw.probes == 0.5 and raw.what == "hoist 0-1"
    assert [entry.best for entry in shown.entries] == [False, True, False]
    assert refitted.name == "hoist + refit" and refitted.probes is None
    assert absent.problem == "too few layers" and absent.kl is None


def test_quality_of_another_plan_is_said_to_be_so(folder: ResultsFolder) -> None:
    contents = {"groups": [[1, 2]], "dropped_attention": [2], "norm": "fold"}
    folder.write("quality.json", {"latest": latest(plan_contents=contents), "kept": {}})
    found = collect(folder)
    assert found.plan is not None and found.plan.dropped_attention == (2,) and found.notes == ()  # no file: that plan
    PLAN.save(folder.file("plan.yaml"))
    assert collect(folder).notes == ()
    PLAN.replace(norm="last").save(folder.file("plan.yaml"))
    assert "another plan (p.yaml)" in collect(folder).notes[0]


def test_a_plan_without_attention_is_noted(folder: ResultsFolder) -> None:
    PLAN.replace(dropped_attention=range(LAYERS)).save(folder.file("plan.yaml"))
    assert "drops every attention" in collect(folder).notes[0]


def test_a_plan_of_a_sweep_is_shown_at_its_ffn_depth(folder: ResultsFolder) -> None:
    point = {"depth": 2, "dropped_attention": [1, 2], "groups": [[1, 2]], "fused_bytes": 8, "on_front": True}
    folder.write("sweep.json", {"points": [{**point, "quality": QUALITY}]})
    (found,) = collect(folder).sweep
    assert found.depth == 2 and found.dropped == 2 and found.front
    assert found.label == "dropped 1-2; fused [1-2]"


def save_matrix(path: Path, unit: Any, dropped: tuple[int, ...]) -> None:
    values = torch.arange(9.0).reshape(3, 3).triu(1) / 10
    vectors = {name: torch.tensor([0.1, 0.2, 0.3]) for name in ("cosine", "ratio", "contribution_cosine")}
    facts: dict[str, Any] = {"attention": (0, 1), "dropped_attention": dropped, "tokens": 8, "sequences": 2}
    DependencyMatrix(values=values, layers=(0, 1, 2), names=("a", "b", "c"), unit=unit, **vectors, **facts).save(path)


def test_the_matrix_of_the_plan_goes_first(folder: ResultsFolder) -> None:
    save_matrix(folder.matrix("ffn", []), "ffn", ())
    save_matrix(folder.matrix("block", []), "block", ())
    found = collect(folder)
    assert found.matrix is not None and found.matrix.unit == "ffn" and found.matrix.dropped == (2,)  # never had any
    assert found.matrix.values[0] == (None, pytest.approx(0.1), pytest.approx(0.2))
    assert [layer.cosine for layer in found.layers] == pytest.approx([0.1, 0.2, 0.3])
    PLAN.save(folder.file("plan.yaml"))
    save_matrix(folder.matrix("ffn", [2]), "ffn", (2,))
    with_plan = collect(folder).matrix
    assert with_plan is not None and with_plan.dropped == (2,)


def test_an_empty_or_missing_folder_says_what_to_run(run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        ran = run("report", "--results", folder)
        assert ran.code == 1 and "fxfusion score" in ran.error and ran.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.json", "{"),
        ("model.json", '{"layers": [{}]}'),
        ("quality.json", '{"kept": {}}'),
        ("quality.json", '{"latest": {"quality": {"a": {}}}}'),
        ("scores_loss.json", '{"scores": 5}'),
        ("sweep.json", '{"points": [{}]}'),
        ("compiled.json", '{"graphs": 3}'),
    ],
)
def test_a_broken_file_is_named_and_the_old_page_stays(run: Run, results: Path, name: str, content: str) -> None:
    assert run("report", "--results", results).code == 0
    page = (results / "report.html").read_bytes()
    (results / name).write_text(content)
    ran = run("report", "--results", results)
    assert ran.code == 1 and f"{name} is broken" in ran.error and "remove it" in ran.error
    assert (results / "report.html").read_bytes() == page
    with pytest.raises(FxFusionError):
        collect(ResultsFolder(results))


def test_a_page_that_cannot_be_written_is_an_error(run: Run, results: Path) -> None:
    ran = run("report", "--results", results, "--output", "/dev/null/page.html")
    assert ran.code == 1 and "/dev/null/page.html: cannot be written" in ran.error
