"""Scores of a model on tasks of the LM Evaluation Harness (`lm-eval`, an optional package).

What a fused model loses shows in perplexity, KL and generation first; these tasks are for numbers that compare with
published ones.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfusion.analysis.batches import measuring, model_device
from fxfusion.analysis.intervals import Estimate
from fxfusion.errors import FxFusionError, OptionError
from fxfusion.report.plain import lines

_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class TaskScore:
    """The metrics of one task or group of tasks, by name (`acc`, or `exact_match,strict` for a filter's result).

    The intervals are normal ones, from lm-eval's standard errors; without such an error they are unbounded.
    `samples` counts the examples, None for a group; `version` is the task's.
    """

    metrics: Mapping[str, Estimate]
    samples: int | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        metrics = {name: estimate.to_dict() for name, estimate in self.metrics.items()}
        return {"metrics": metrics, "samples": self.samples, "version": self.version}

    def __str__(self) -> str:
        return lines(self.metrics.items(), "" if self.samples is None else f"on {self.samples:,} examples")


def lm_eval_results(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int | str = 8,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, TaskScore]:
    """Run tasks of the LM Evaluation Harness on a model as it is, in memory.

    Args:
        model: a transformers model, compiled or not. Tasks that generate text run `model.generate`, which
            `torch.compile(model)` does not compile; `model.compile()` does.
        tokenizer: the model's; it stays as it is.
        tasks: names or patterns of tasks and groups (`python -m lm_eval ls tasks`), or paths of task files.
        batch_size: or `"auto"`: the largest that fits.
        limit: examples per task at most; below 1 a fraction of them. For trials only.
        num_fewshot: examples shown before each question; None: as the task says.
        include_path: a folder with task files of your own.
        resamples: of lm-eval's bootstrap, for metrics whose standard error has no formula.
        seed: of everything random: the choice of examples to show, the bootstrap.

    Returns:
        The scores by name of task or group. A task fetches its data through `datasets`, from the network unless it
        is in its cache.

    Raises:
        FxFusionError: lm-eval is not installed.
        OptionError (a ValueError): no tasks, an unknown one, no tokenizer.
        ValueError: a model that is not causal or has no weights.
        TypeError: a model that is not one of transformers.
    """
    if tokenizer is None:
        raise OptionError("lm-eval needs the model's tokenizer")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"lm-eval needs a model of transformers, got {type(model).__name__}")
    if isinstance(tasks, str) or not tasks:
        raise OptionError(f"tasks must be a list with at least one name, got {tasks!r}")
    model_device(model)
    harness, huggingface, tasks_module = (_need(name) for name in ("", ".models.huggingface", ".tasks"))
    manager = tasks_module.TaskManager(include_path=None if include_path is None else str(include_path))
    _check_tasks(tasks, manager)
    with measuring(model), _random_state():
        # Said to be causal, as lm-eval would ask its own list of types; its copy of the tokenizer may get padding.
        wrapped = huggingface.HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size
        )
        found = harness.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=resamples,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {} if found is None else _scores(found)  # None: of several processes only the first has results


def _need(part: str) -> Any:
    try:
        return import_module(f"lm_eval{part}")
    except ImportError as error:
        raise FxFusionError(f"lm-eval cannot be imported ({error}): pip install 'fxfusion[eval]'") from error


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    for task in tasks:
        if manager.match_tasks([task]) or Path(task).is_file():
            continue
        near = ", ".join(get_close_matches(task, manager.all_tasks))
        raise OptionError(f"lm-eval has no task {task!r}" + (f"; near it: {near}" if near else ""))


@contextmanager
def _random_state() -> Iterator[None]:
    """lm-eval seeds every generator of the process; the caller's go on afterwards as if it had not."""
    numpy_random = import_module("numpy").random
    python, numpy = random.getstate(), numpy_random.get_state()
    with torch.random.fork_rng(range(torch.accelerator.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            numpy_random.set_state(numpy)


def _scores(found: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Out of lm-eval's flat dict: `"acc,none": 0.5, "acc_stderr,none": 0.1`, where none is the name of no filter."""
    scores = {}
    for task, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            margin = _NORMAL_95 * error if isinstance(error, int | float) else math.inf
            name = metric if chosen == "none" else key
            metrics[name] = Estimate(float(value), float(value) - margin, float(value) + margin)
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        version = found.get("versions", {}).get(task)
        scores[task] = TaskScore(metrics, samples, None if version is None else str(version))
    return scores
