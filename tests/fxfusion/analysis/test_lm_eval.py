from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fxfusion.analysis.intervals import Estimate
from fxfusion.analysis.lm_eval import TaskScore, _check_tasks, _scores, lm_eval_results
from fxfusion.errors import FxFusionError, OptionError

VOCABULARY = 40
TASK = """
task: next_number
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words that are numbers, without a padding token."""
    words = {"<eos>": 0, "<unk>": 1, **{str(number): number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5)).eval()


def make_questions(count: int = 24) -> list[dict[str, Any]]:
    draw = random.Random(5)

    def numbers(length: int) -> str:
        return " ".join(str(draw.randrange(2, VOCABULARY)) for _ in range(length))

    return [
        {"question": numbers(draw.randrange(2, 6)), "choices": [numbers(2) for _ in range(3)], "answer": row % 3}
        for row in range(count)
    ]


def make_task(folder: Path, questions: list[dict[str, Any]]) -> Path:
    tasks, data = folder / "tasks", folder / "data.jsonl"
    tasks.mkdir()
    data.write_text("\n".join(map(json.dumps, questions)))
    (tasks / "next_number.yaml").write_text(TASK.format(data=data, cache=folder / "cache"))
    return tasks


def best_choice(model: LlamaForCausalLM, question: dict[str, Any]) -> int:
    """The choice with the highest log-probability after the question."""
    start = [int(word) for word in question["question"].split()]
    scores = []
    for choice in question["choices"]:
        ids = start + [int(word) for word in choice.split()]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        scores.append(sum(float(log_probabilities[at - 1, ids[at]]) for at in range(len(start), len(ids))))
    return scores.index(max(scores))


def accuracy_by_hand(model: LlamaForCausalLM, questions: list[dict[str, Any]]) -> float:
    return sum(best_choice(model, question) == question["answer"] for question in questions) / len(questions)


@pytest.mark.slow
def test_a_task_of_ones_own_offline(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'fxfusion[eval]'")
    questions, tokenizer, model, other = make_questions(), make_tokenizer(), make_model(), make_model(seed=1)
    for question in questions[:20]:
        question["answer"] = best_choice(model, question)
    folder, expected = make_task(tmp_path, questions), accuracy_by_hand(model, questions)
    model.train()
    random.seed(7)
    torch.manual_seed(7)
    scores = lm_eval_results(model, tokenizer, ["next_number"], include_path=folder, batch_size=4)
    # The caller's model, tokenizer and random numbers go on as before.
    numbers = random.random(), float(torch.rand(()))
    random.seed(7)
    torch.manual_seed(7)
    assert numbers == (random.random(), float(torch.rand(())))
    assert model.training and tokenizer.pad_token is None
    assert scores.keys() == {"next_number"}
    score = scores["next_number"]
    assert score.metrics["acc"].value == pytest.approx(expected)
    assert score.samples == len(questions) and score.version == "2.0"
    error = math.sqrt(expected * (1 - expected) / (len(questions) - 1))
    assert score.metrics["acc"].high - expected == pytest.approx(1.959964 * error)
    # Another model has another score, here on the first questions alone and with the path of the task.
    (score,) = lm_eval_results(other, tokenizer, [str(folder / "next_number.yaml")], limit=18).values()
    assert score.samples == 18
    assert score.metrics["acc"].value == pytest.approx(accuracy_by_hand(other, questions[:18])) != expected


def test_an_unknown_task_is_an_error_that_names_its_neighbours(tmp_path: Path) -> None:
    class Manager:
        all_tasks = ["next_number", "hard_words"]

        def match_tasks(self, patterns: list[str]) -> list[str]:
            return [task for task in self.all_tasks if task in patterns]

    file = tmp_path / "task.yaml"
    file.touch()
    _check_tasks(["next_number", str(file)], Manager())
    with pytest.raises(OptionError, match="no task 'next_numbr'; near it: next_number$"):
        _check_tasks(["next_number", "next_numbr"], Manager())
    for tasks in ("next_number", []):
        with pytest.raises(OptionError, match="a list with at least one name, got"):
            lm_eval_results(make_model(), make_tokenizer(), tasks)


def test_scores_are_read_out_of_the_flat_dict() -> None:
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A"},
            "group": {"alias": " - group", "acc,none": 0.25},
        },
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "versions": {"a": 1.0},
    }
    scores = _scores(found)
    acc = scores["a"].metrics["acc"]
    assert (acc.value, acc.low, acc.high) == pytest.approx((0.5, 0.5 - 0.1959964, 0.5 + 0.1959964))
    assert scores["a"].metrics["f1,strict"] == Estimate(1.0, -math.inf, math.inf)
    assert (scores["a"].samples, scores["a"].version) == (4, "1.0")
    assert scores["group"] == TaskScore({"acc": Estimate(0.25, -math.inf, math.inf)})
    parsed = json.loads(json.dumps({name: score.to_dict() for name, score in scores.items()}, allow_nan=False))
    assert parsed["group"] == {
        "metrics": {"acc": {"value": 0.25, "low": None, "high": None}},
        "samples": None,
        "version": None,
    }


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FxFusionError, match=r"pip install 'fxfusion\[eval\]'"):
        lm_eval_results(make_model(), make_tokenizer(), ["any"])


def test_bad_models_and_tokenizers() -> None:
    with pytest.raises(OptionError, match="needs the model's tokenizer"):
        lm_eval_results(make_model(), None, ["any"])
    with pytest.raises(TypeError, match="a model of transformers, got Linear"):
        lm_eval_results(torch.nn.Linear(1, 1), make_tokenizer(), ["any"])
    with pytest.raises(ValueError, match="meta device"):
        lm_eval_results(make_model().to("meta"), make_tokenizer(), ["any"])
