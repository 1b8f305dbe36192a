"""Every folder that fxfusion wrote is a MODEL that can be measured: alone, and against the intact one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fxfusion
from fxfusion.analysis.quality import evaluate
from fxfusion.cli import inputs
from tests.fxfusion.cli.conftest import Run, call
from tests.fxfusion.recovery.own_text import LENGTH, model_of, own_text

WINDOW = {"groups": [{"members": [1, 2], "mixers": "hoist"}]}
PLANS = {
    "dropped": {"dropped_attention": [1]},
    "fused": WINDOW,
    "wide": {"groups": [{"members": [1, 2], "mixers": "wide"}]},
}
KINDS = (*PLANS, "engines", "refitted", "recovered")
QUESTIONS = """
task: next_number
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/data.jsonl}}, cache_dir: {0}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def size(place: Path, sequences: int = 32) -> list[object]:
    return ["--text", place / "text.safetensors", "--length", LENGTH, "--batch", 16, "--sequences", sequences]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`intact`, with words for its tokens and text of its own, and a folder of each kind."""
    path, intact = tmp_path_factory.mktemp("own"), model_of()
    words = {"<eos>": 0, **{str(number): number for number in range(1, intact.config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    intact.save_pretrained(path / "intact")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path / "intact")
    save_file({"input_ids": torch.cat(own_text()).to(torch.int32)}, path / "text.safetensors")
    for name, plan in PLANS.items():
        fxfusion.save_pretrained(fxfusion.from_pretrained(path / "intact"), path / name, plan=plan)
    fxfusion.save_pretrained(fxfusion.from_pretrained(path / "intact"), path / "engines", "nemotron-nas", plan=WINDOW)
    fxfusion.FusionPlan(**WINDOW).save(path / "plan.yaml")
    more = [*size(path, 96), "--results", path / "results"]
    assert call("refit", path / "intact", "--plan", path / "plan.yaml", "--output", path / "refitted", *more) == 0
    more += ["--output", path / "recovered", "--steps", 8, "--every", 4]
    assert call("recover", path / "fused", "--reference", path / "intact", *more) == 0
    return path


def measured(place: Path, name: str, results: Path) -> list[object]:
    return ["eval", place / name, "--results", results, "--compiler", "eager", *size(place), "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_measured_as_the_model_that_it_holds(run: Run, place: Path, tmp_path: Path, kind: str) -> None:
    batches = inputs.read_batches(
        [place / "text.safetensors"], None, length=LENGTH, batch=16, sequences=32, seed=0, suffixes=()
    )
    expected = evaluate(fxfusion.from_pretrained(place / kind), batches, fxfusion.from_pretrained(place / "intact"))
    ran = run(*measured(place, kind, tmp_path / "alone"))
    assert ran.code == 0, ran.err
    assert list(ran.json["quality"]) == [kind], "it is not called the intact model"
    assert ran.json["quality"][kind]["loss"]["value"] == pytest.approx(float(expected.loss), rel=1e-5)

    more = ["--baseline", place / "intact", "--generate", 2, "--new-tokens", 4, "--speed"]
    ran = run(*measured(place, kind, tmp_path / "against"), *more)
    assert ran.code == 0, ran.err
    control, found = (ran.json["quality"][name] for name in ("intact", kind))
    assert control["kl"]["value"] == 0
    assert found["kl"]["value"] == pytest.approx(float(expected.kl or 0), rel=1e-4) and found["kl"]["value"] > 0
    assert ran.json["generation"]["prompts"] == 2
    assert all(set(one["fused_against"]) == {"baseline"} for one in ran.json["speed"].values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "recovered"])
def test_a_folder_is_scored_and_writes_text(run: Run, place: Path, tmp_path: Path, kind: str) -> None:
    ran = run("score", place / kind, "--results", tmp_path / "results", *size(place))
    assert ran.code == 0 and "numbered as they stand in the fused model" in ran.err, ran.err
    ran = run("generate", place / kind, "--prompt", "2 3 4", "--new-tokens", 4)
    assert ran.code == 0 and ran.out.startswith("2 3 4"), ran.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wide", "engines", "refitted"])
def test_tasks_of_lm_eval_are_run_on_a_folder(run: Run, place: Path, tmp_path: Path, kind: str) -> None:
    questions = [{"question": str(2 + n), "choices": [str(3 + n), "39"], "answer": n % 2} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "next.yaml").write_text(QUESTIONS.format(tmp_path))
    more = ["--baseline", place / "intact", "--tasks", "next_number", "--task-folder", tmp_path]
    ran = run(*measured(place, kind, tmp_path / "results"), *more)
    assert ran.code == 0, ran.err
    assert list(ran.json["tasks"]) == ["intact", kind]
    assert all(scores["next_number"]["samples"] == 8 for scores in ran.json["tasks"].values())


@pytest.mark.slow
def test_two_folders_of_one_name_are_told_apart(run: Run, place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place / "intact", tmp_path / "fused"))
    ran = run(*measured(place, "fused", tmp_path / "results"), "--baseline", other)
    assert ran.code == 0, ran.err
    assert list(ran.json["quality"]) == [str(other.resolve()), str((place / "fused").resolve())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [("plan", ["--drop", 1]), ("sweep", []), ("auto", ["--output", "x"]), ("eval", ["--plan"])],
)
def test_what_a_plan_is_made_for_is_the_model_as_it_was(
    run: Run, place: Path, tmp_path: Path, command: str, more: list[object]
) -> None:
    given = [*more, place / "plan.yaml"] if more == ["--plan"] else more
    ran = run(command, place / "fused", "--results", tmp_path / "results", *size(place), *given)
    assert ran.code == 1 and "was fused, or lost attention, already" in ran.error
