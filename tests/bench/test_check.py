"""The regression guard: what is counted is as recorded, and a regression is found."""

from __future__ import annotations

from typing import Any

import pytest

from bench import check
from fxfusion.compiler import pipeline
from fxfusion.graph.ops import op_name

RENEW = "if that is right: python -m bench.check --record"


def test_counts_are_as_recorded() -> None:
    assert not (problems := check.worse(check.counts(kernels=False), check.recorded())), (problems, RENEW)


@pytest.mark.slow  # 5 s: Inductor compiles four layers twice
@pytest.mark.compile
def test_kernels_are_as_recorded() -> None:
    assert not (problems := check.worse(check.kernel_counts(), check.recorded())), (problems, RENEW)
    found = check.recorded()
    assert found["kernels, fused"] < found["kernels, unfused"]


def test_a_step_done_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching is two thirds of the work; a tenth more would be found too."""
    analyse = pipeline.analyse

    def twice(*arguments: Any) -> Any:
        analyse(*arguments)
        return analyse(*arguments)

    calls, _ = check.fused_with_calls(check.LAYERS)
    assert not check.worse({"function calls": calls}, check.recorded())
    monkeypatch.setattr(pipeline, "analyse", twice)
    calls, _ = check.fused_with_calls(check.LAYERS)
    assert any("function calls" in problem for problem in check.worse({"function calls": calls}, check.recorded()))


def test_work_that_grows_faster_than_the_layers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run_passes = pipeline.run_passes

    def quadratic(module: Any, *arguments: Any) -> Any:
        for _ in module.graph.nodes:
            for node in module.graph.nodes:
                op_name(node)
        return run_passes(module, *arguments)

    monkeypatch.setattr(pipeline, "run_passes", quadratic)
    calls = [check.fused_with_calls(layers)[0] for layers in (check.LAYERS // 2, check.LAYERS)]
    name = "function calls, growth from half the layers"
    problems = check.worse({name: calls[1] / calls[0], "function calls": calls[1]}, check.recorded())
    assert problems, calls


@pytest.mark.parametrize(
    ("name", "value", "is_worse"),
    [
        ("function calls", 1.02, False),
        ("function calls", 1.05, True),
        ("function calls", 0.5, False),
        ("nodes after", 1.001, True),
        ("packs after 3 graphs", 2, True),
    ],
)
def test_what_is_worse(name: str, value: float, is_worse: bool) -> None:
    before = check.recorded()
    assert bool(check.worse({name: before[name] * value}, before)) is is_worse
    assert check.worse({"something new": 1}, before) == ["something new: not recorded"]
