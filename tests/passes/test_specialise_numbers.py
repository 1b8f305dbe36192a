"""specialise_numbers: numbers of modules are literals under `dynamic=True` too, and never stale."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion import ffn_fusion, last_reports
from fxfusion.compiler.capture import capture_dynamo
from fxfusion.graph import ops
from fxfusion.passes.specialise_numbers import SpecialiseNumbers
from tests.helpers import (
    History,
    Plain,
    Rms,
    Stack,
    assert_exact,
    error_of,
    graph_text,
    parallel_form,
    run_passes,
    tokens,
)
from tests.helpers import stack as stack_of
from tests.passes.output_norms import post_stack

pytestmark = pytest.mark.usefixtures("clean_dynamo")


BUILDS: dict[str, tuple[Callable[[], Stack], str]] = {
    "wide": (lambda: stack_of(count=3), "concatenated"),
    "grouped": (lambda: post_stack(norm=Rms), "grouped"),
    "grouped, scaled": (lambda: post_stack(nn.LayerNorm, nn.RMSNorm, scale=0.4), "grouped"),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_dynamic_graphs_are_fused_and_never_stale(build: tuple[Any, str]) -> None:
    make, form = build
    model: Any = make()
    options = {"compiler": "aot_eager", "strict": True, "verify": "numeric", "form": "concatenated"}
    call = torch.compile(model, backend=ffn_fusion, dynamic=True, options=options)
    for seq in (5, 9, 3):
        x = tokens(seq=seq)
        assert_exact(call(x), parallel_form(model, x), torch.float64)
        assert error_of(call(x), model(x)) > 1e-3
    assert [(group.form, len(group.members)) for group in last_reports()[-1].groups] == [(form, 3)]
    before = len([report for report in last_reports() if report.groups])
    norms = [part for part in model.modules() if hasattr(part, "eps")]
    for norm in norms:  # of all, so that the members still fit
        norm.eps = 0.5
    fresh = parallel_form(model, x)
    assert_exact(call(x), fresh, torch.float64)
    assert len([report for report in last_reports() if report.groups]) > before, "it must be compiled anew"
    for norm in norms:
        norm.eps = 0.25
    assert error_of(parallel_form(model, x), fresh) > 1e-3, "the number does not matter: the comparison shows nothing"
    assert_exact(call(x), parallel_form(model, x), torch.float64)


def test_members_whose_numbers_differ_are_refused_by_their_numbers() -> None:
    model = post_stack(norm=Rms)
    model.layers[1].output.eps = 0.5
    call = torch.compile(model, backend=ffn_fusion, dynamic=True, options={"compiler": "eager"})
    x = tokens()
    assert_exact(call(x), model(x), torch.float64)
    report = last_reports()[-1]
    assert not report.groups
    assert any(found.code.value == "different_literal" and "0.5" in found.message for found in report.refusals)


class Tempered(nn.Module):
    """A number of the module, and one that the caller passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack_of(count=2)
        self.temperature = 0.7

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.inner(x) * self.temperature * scale


def test_numbers_of_the_caller_stay_inputs() -> None:
    model, x, texts, changed = Tempered(), tokens(), [], []

    def look(gm: Any, inputs: list[Any]) -> Any:
        work = capture_dynamo(gm, inputs).copy()
        numbers, history = SpecialiseNumbers(), History()
        texts.append(graph_text(work))
        run_passes(work.module, [numbers], history)
        texts.append(graph_text(work))
        left = [node for node in work.module.graph.nodes if ops.op_name(node) == "item"]
        changed.append((history.records[-1].changed, len(numbers.numbers), len(left)))
        again = History()
        run_passes(work.module, [SpecialiseNumbers()], again)
        assert again.records[-1].changed == 0, "twice is once"
        return gm.forward

    torch.compile(model, backend=look, dynamic=True)(x, 1.5)
    assert changed == [(3, 3, 1)] and "0.7" in texts[1] and "0.7" not in texts[0]


def test_a_graph_without_them_is_left_alone() -> None:
    """And nothing is written out where no compile is at work that could take a guard."""
    found: list[Any] = []

    def keep(gm: Any, inputs: list[Any]) -> Any:
        found.append(capture_dynamo(gm, inputs))
        return gm.forward

    for dynamic in (False, True):
        torch._dynamo.reset()
        torch.compile(Tempered(), backend=keep, dynamic=dynamic)(tokens(), 1.5)
        work = found[-1].copy()
        text, history = graph_text(work), History()
        run_passes(work.module, [SpecialiseNumbers()], history)
        assert history.records[-1].changed == 0 and graph_text(work) == text
    assert SpecialiseNumbers.exact and "item" in text


def test_nothing_is_guarded_where_nothing_is_fused() -> None:
    model = Tempered()
    model.inner = stack_of(count=1)
    call = torch.compile(model, backend=ffn_fusion, dynamic=True, options={"compiler": "eager"})
    x = tokens()
    before = fxfusion.last_reports()
    for temperature in (0.7, 0.8, 0.9):
        model.temperature = temperature
        assert_exact(call(x, 1.5), model(x, 1.5), torch.float64)
    new = [report for report in fxfusion.last_reports() if not any(report is old for old in before)]
    assert len(new) == 1 and not new[0].groups


HELD = {"global": 1.0}


class Scheduled(Plain):
    """A branch with a number that changes between calls, as schedules of depth or strength do."""

    number = 1.0

    def forward(self, n: Tensor) -> Tensor:
        return super().forward(n) * self.number


class Reversed(Scheduled):
    def forward(self, n: Tensor) -> Tensor:
        return Plain.forward(self, n) * (1 - self.number)


class OfObject(Scheduled):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.config = types.SimpleNamespace(number=1.0)

    def forward(self, n: Tensor) -> Tensor:
        return Plain.forward(self, n) * self.config.number


class OfGlobal(Scheduled):
    def forward(self, n: Tensor) -> Tensor:
        return Plain.forward(self, n) * HELD["global"]


class Dropped(Scheduled):
    def forward(self, n: Tensor) -> Tensor:
        return nn.functional.dropout(Plain.forward(self, n), self.number)


class Inner(Scheduled):
    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(nn.functional.elu(self.fc1(n), self.number))


def set_number(model: Stack, number: float, layers: Sequence[int]) -> None:
    HELD["global"] = number
    for layer in layers:
        ffn: Any = model.layers[layer].ffn
        ffn.number = number
        if hasattr(ffn, "config"):
            ffn.config.number = number


def outcome(report: fxfusion.FusionReport) -> tuple[list[int], list[tuple[str, str]]]:
    refusals = [(refusal.code.value, refusal.layer) for refusal in report.refusals]
    return [len(group.members) for group in report.groups], sorted(refusals)


SCHEDULES: dict[str, tuple[type[Scheduled], Sequence[float], Sequence[int]]] = {
    "from nothing": (Scheduled, (0.0, 1.0, 0.5, 0.0), (0, 1, 2)),
    "to nothing and back": (Scheduled, (1.0, 0.0, 0.5, 2.0), (0, 1, 2)),
    "whole numbers": (Scheduled, (0, 1, 2), (0, 1, 2)),
    "one of them": (Scheduled, (1.0, 0.0, 0.5), (1,)),
    "arithmetic": (Reversed, (0.5, 1.0, 0.25), (0, 1, 2)),
    "of an object": (OfObject, (1.0, 0.0, 0.5), (0, 1, 2)),
    "of a global": (OfGlobal, (1.0, 0.0, 0.5), (0, 1, 2)),
    "dropout": (Dropped, (0.0, 0.5, 0.25, 0.0), (0, 1, 2)),
    "members that part and meet": (Inner, (2.0, 3.0, 1.0), (1,)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_whether_ffns_fuse_depends_on_the_number_never_on_history(schedule: Any) -> None:
    """What is compiled after other numbers is what is compiled for this number alone."""
    kind, numbers, layers = schedule
    x, model = tokens(), stack_of(kind, count=3)
    run = torch.compile(model, backend=ffn_fusion, options={"compiler": "eager"})
    for number in numbers:
        set_number(model, number, layers)
        torch.manual_seed(0)
        before = last_reports()
        got = run(x)
        alone = outcome(fxfusion.explain(model, x))
        torch.manual_seed(0)
        assert_exact(got, parallel_form(model, x) if alone[0] else model(x), torch.float64)
        for report in last_reports()[len(before) :]:
            assert outcome(report) == alone, number
