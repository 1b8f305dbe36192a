"""Windows of families with a norm on the FFN's output, or inside it: equal to the eager hoisted form, with a cache too.

Each member keeps its own norm; gate and up are one matrix. Attention may have a norm on its output as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxfusion import FusionPlan
from fxfusion.backend import last_reports
from tests.end_to_end.caching import decoded, new_cache, token_ids
from tests.end_to_end.eager_hoisted import hoisted
from tests.end_to_end.families import Family, disturb, layers_of, make_inputs, relative, run
from tests.end_to_end.family_table import INNER, OUTPUT_NORM, OUTPUT_NORM_SLOW, PER_CHANNEL, family_named
from tests.end_to_end.test_hoist_families import WIDE, WINDOWS, compiled, intact

RED = 1e-4
CACHED = 1e-6  # norms in float32 see other sums when tokens come one by one
QUICK = ("olmo2", "gemma2")  # a norm behind each sublayer; norms on both sides of each


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def each(families: Any) -> Any:
    cases = [
        pytest.param(family, id=family.id, marks=() if family.id in QUICK else pytest.mark.slow) for family in families
    ]
    return pytest.mark.parametrize("family", cases)


@each((*OUTPUT_NORM, *OUTPUT_NORM_SLOW, *INNER, *PER_CHANNEL))
def test_a_window_is_fused_exactly(family: Family) -> None:
    model = intact(family)
    inputs = make_inputs(family, model)
    sequential = run(model, inputs)
    with hoisted(model, family, WINDOWS):
        wanted = run(model, inputs)
    assert relative(wanted, sequential) > 0.01, "the hoisted form is too close to tell them apart"
    call = compiled(model, policy={"windows": WINDOWS}, verify="numeric")
    assert relative(run(call, inputs), wanted) <= family.limit
    groups, form = last_reports()[-1].groups, "grouped" if family in (*OUTPUT_NORM, *OUTPUT_NORM_SLOW) else ""
    assert [(len(group.members), group.form) for group in groups] == [(2, form or "concatenated")] * 2
    assert [group.moved for group in groups] == [(f"{family.layers}.1",), (f"{family.layers}.3",)]
    disturb(model, family)
    with hoisted(model, family, WINDOWS):
        changed = run(model, inputs)
    assert relative(changed, wanted) > RED, "a changed weight was not noticed"
    assert relative(run(call, inputs), changed) <= family.limit


def cached(family: Family, kind: str, wide: bool) -> Any:
    quick = (family.id, kind, wide) in (("olmo2", "static", True), ("gemma2", "dynamic", False))
    marks = () if quick else pytest.mark.slow
    return pytest.param(family, kind, wide, id=f"{family.id}-{kind}-{'wide' if wide else 'hoist'}", marks=marks)


CACHED_CASES = [
    cached(*case) for case in itertools.product((*OUTPUT_NORM, *OUTPUT_NORM_SLOW), ("dynamic", "static"), (False, True))
]


@pytest.mark.parametrize(("family", "kind", "wide"), CACHED_CASES)
def test_cached_decoding(family: Family, kind: str, wide: bool) -> None:
    """Keys and values that read the stream itself, with no norm before them, reach a static cache by a write alone."""
    model = intact(family, use_cache=True)
    ids = token_ids(length=10)
    with hoisted(model, family, WINDOWS, wide=wide):
        wanted = decoded(model, ids, new_cache(kind, model, 10))
        at_once = run(model, {"input_ids": ids, "use_cache": False})
    with hoisted(model, family, WINDOWS, wide=not wide):
        other = decoded(model, ids, new_cache(kind, model, 10))
    plan = WIDE if wide else FusionPlan(groups=WINDOWS, hoist=True)
    found = decoded(compiled(model, plan=plan), ids, new_cache(kind, model, 10))
    assert relative(found, wanted) <= family.limit and relative(found, at_once) <= CACHED
    assert relative(wanted, other) > 0.01, "the two forms are too close to tell them apart"
    assert {len(report.groups) for report in last_reports()[-2:]} == {2}


@each(OUTPUT_NORM)
def test_a_wide_window_reads_one_stream_and_keeps_its_projections_apart(family: Family) -> None:
    """A norm of a sum is no sum of norms: their last projections cannot be one. The report names the layers."""
    model = intact(family)
    inputs = make_inputs(family, model)
    with hoisted(model, family, WINDOWS, wide=True):
        wanted = run(model, inputs)
    with hoisted(model, family, WINDOWS):
        assert relative(wanted, run(model, inputs)) > 0.01, "the two forms are too close to tell them apart"
    assert relative(run(compiled(model, plan=WIDE), inputs), wanted) <= family.limit
    notes = [found for found in last_reports()[-1].refusals if "projections of its window stay apart" in found.message]
    assert [found.layer for found in notes] == [f"{family.layers}.{first}" for first, _ in WINDOWS]
    assert all(f"{found.layer} does not end with a linear layer but with" in found.message for found in notes)


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["hoist", "wide"])
@pytest.mark.parametrize("name", ["gemma2", "llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_norm_of_the_last_member_serves_all(name: str, wide: bool) -> None:
    """Those before the projections; members keep their own norms behind them."""
    family = family_named(name)
    model = intact(family)
    inputs = make_inputs(family, model)
    with hoisted(model, family, WINDOWS, wide=wide):
        own = run(model, inputs)
    with hoisted(model, family, WINDOWS, wide=wide, last_norm=True):
        wanted = run(model, inputs)
    assert relative(wanted, own) > 0.01, "the two norms' hoisted forms are too close to tell them apart"
    groups = [{"members": window, "mixers": "wide" if wide else "hoist"} for window in WINDOWS]
    call = compiled(model, plan=FusionPlan(groups=groups, norm="last"), verify="numeric")
    assert relative(run(call, inputs), wanted) <= family.limit
    with torch.no_grad():  # the last member's norm counts, the first one's does not
        first, last = (layers_of(model, family)[number].get_submodule(family.ffn_norm) for number in WINDOWS[0])
        first.weight.add_(0.5)
        assert relative(run(call, inputs), wanted) <= family.limit
        last.weight.add_(0.5)
    assert relative(run(call, inputs), wanted) > RED, "a changed norm was not noticed"
