"""Every family of transformers: fused by `torch.compile` equals the parallel form, computed in eager.

The matchers know no family, so each new spelling of a norm, an MLP or a residual addition must work
by its dataflow. Tables and expectations are in `family_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from fxfusion import ffn_fusion
from fxfusion.backend import last_reports
from fxfusion.report import FusionReport
from tests.end_to_end.families import (
    Family,
    disturb,
    make_inputs,
    make_model,
    parallel_form,
    relative,
    run,
)
from tests.end_to_end.family_table import (
    FAST,
    INNER,
    LAST_NORM,
    LAST_NORM_SLOW,
    LEADING,
    LEADING_SLOW,
    OUTPUT_NORM,
    OUTPUT_NORM_SLOW,
    PER_CHANNEL,
    REFUSED,
    VARIANTS,
    each,
    named,
)
from tests.end_to_end.slow_families import DENSE_LAYERS_OF_MOE, SCALED, SLOW

pytestmark = pytest.mark.usefixtures("clean_dynamo")

RED = 1e-4
"""A comparison that must fail misses by more than this; every limit is far below."""


def compiled(model: nn.Module, policy: Mapping[str, Any] | str | None = None) -> Any:
    options = {"compiler": "eager", "verify": "numeric", "strict": True, "policy": policy}
    return torch.compile(model, backend=ffn_fusion, options=options)


def run_reported(call: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, FusionReport]:
    """The output, and one report on all graphs that this call compiled."""
    before = {id(report) for report in last_reports()}
    output = run(call, inputs)
    made = [report for report in last_reports() if id(report) not in before]
    return output, FusionReport(graphs=tuple(graph for report in made for graph in report.graphs))


def count(report: FusionReport) -> int:
    return sum(len(group.members) for group in report.groups)


def codes(report: FusionReport, layers: str) -> set[str]:
    """Refusal codes of what is no mixer and lies in the given layers."""
    return {found.code.value for found in report.refusals if found.layer.startswith(layers)}


def check(family: Family, model: nn.Module, *, leading: bool = False, last_norm: bool = False) -> FusionReport:
    """Fused equals parallel, before and after a weight changed; the change alone is seen."""
    inputs = make_inputs(family, model)
    sequential = run(model, inputs)
    parallel = parallel_form(model, family, inputs, leading=leading, last_norm=last_norm)
    assert relative(parallel, sequential) > 0.01, "the parallel form is too close to tell them apart"
    call = compiled(model, {"include_leading": leading, "norm": "last" if last_norm else "fold"})
    fused, report = run_reported(call, inputs)
    error = relative(fused, parallel)
    assert error <= family.limit
    disturb(model, family)
    changed = parallel_form(model, family, inputs, leading=leading, last_norm=last_norm)
    refreshed = run(call, inputs)
    seen, error = relative(refreshed, parallel), relative(refreshed, changed)
    assert seen > RED, "a changed weight was not noticed"
    assert error <= family.limit
    return report


@each((*FAST, *INNER), (*VARIANTS, *SLOW, *PER_CHANNEL, *DENSE_LAYERS_OF_MOE, *SCALED))
def test_family_is_fused_exactly(family: Family) -> None:
    report = check(family, make_model(family))
    assert count(report) == family.fused
    assert len(report.groups) == family.passes
    assert not codes(report, f"{family.layers}.2"), "a member was refused too"


@each(OUTPUT_NORM, OUTPUT_NORM_SLOW)
def test_a_family_with_norms_on_the_output_is_fused_exactly(family: Family) -> None:
    report = check(family, make_model(family))
    assert [(group.form, len(group.members)) for group in report.groups] == [("grouped", 3)]
    assert not codes(report, f"{family.layers}.2"), "a member was refused too"


@each(named(LEADING), named(LEADING_SLOW))
def test_the_leading_ffn_joins(family: Family) -> None:
    assert count(check(family, make_model(family), leading=True)) == family.fused + 1


@each(named(LAST_NORM), named(LAST_NORM_SLOW))
def test_the_last_norm_serves_all(family: Family) -> None:
    model = make_model(family)
    inputs = make_inputs(family, model)
    own, last = (parallel_form(model, family, inputs, last_norm=last) for last in (False, True))
    assert relative(last, own) > 0.01, "the two norms' parallel forms are too close to tell them apart"
    assert count(check(family, model, last_norm=True)) == family.fused


# --- refused, and then bit-equal to the model as it was given ------------------------------------------


@each(REFUSED)
def test_family_is_refused_and_left_alone(family: Family) -> None:
    model = make_model(family)
    inputs = make_inputs(family, model)
    expected = run(model, inputs)
    output, report = run_reported(compiled(model), inputs)
    assert count(report) == 0
    for layer in range(1, 3):
        assert codes(report, f"{family.layers}.{layer}") == {family.refused}
    assert torch.equal(output, expected)
