"""parallelise: every member reads the group's input; approximate, and marked so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxfusion.passes.check_group import GroupChecker
from fxfusion.passes.ffn import Group
from fxfusion.passes.find_chains import find_chains
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.parallelise import Parallelise
from fxfusion.passes.plan_groups import plan_by_policy
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import (
    CapturedGraph,
    History,
    Stack,
    assert_exact,
    capture,
    error_of,
    facts_of,
    graph_text,
    normalise,
    parallel_form,
    run_graph,
    run_passes,
    stack,
    tokens,
)


def planned(model: Stack, **policy: Any) -> tuple[CapturedGraph, tuple[Group, ...]]:
    """A normalised graph of the model, and the policy's groups in it."""
    x = tokens(dtype=next(model.parameters()).dtype)
    work = normalise(capture(model, x, how="symbolic"))
    facts = facts_of(work)
    matches = match_residual(facts, {})
    chains, _ = find_chains(matches, facts)
    groups, _ = plan_by_policy(chains, matches.ffns, FusionPolicy(**policy), GroupChecker(facts, matches.ffns))
    return work, groups


def parallelised(model: Stack, **policy: Any) -> tuple[CapturedGraph, int]:
    work, groups = planned(model, **policy)
    history = History()
    run_passes(work.module, [Parallelise(groups)], history)
    return work, history.records[-1].changed


@pytest.mark.parametrize("norm", ["fold", "last"])
def test_equals_the_parallel_form(norm: Any) -> None:
    model, x = stack(count=4), tokens()
    work, changed = parallelised(model, norm=norm)
    assert changed == 3
    assert_exact(run_graph(work), parallel_form(model, x, norm=norm), torch.float64)
    assert error_of(run_graph(work), model(x)) > 1e-2, "an approximation, not the model itself"
    with torch.no_grad():
        model.layers[1].norm.weight.mul_(1.5)
    assert error_of(run_graph(work), parallel_form(model, x, norm=norm)) < 1e-10, "weights are shared"
    other = parallel_form(stack(count=4, seed=1), x, norm=norm)
    assert error_of(run_graph(work), other) > 1e-2, "the comparison can fail"


def test_several_groups_of_one_chain() -> None:
    model, x = stack(count=5), tokens()
    work, changed = parallelised(model, max_members=2)
    assert changed == 2
    assert_exact(run_graph(work), parallel_form(model, x, [[0, 1], [2, 3]]), torch.float64)


def test_is_marked_approximate_and_does_nothing_without_groups() -> None:
    model, x = stack(count=1), tokens()
    work, changed = parallelised(model)
    assert changed == 0 and not Parallelise.exact
    assert torch.equal(run_graph(work), model(x))


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    model = stack(count=2)
    work, groups = planned(model)
    golden("parallelise.before", graph_text(work))
    run_passes(work.module, [Parallelise(groups)], History())
    golden("parallelise.after", graph_text(work))
    last, _ = parallelised(model, norm="last")
    golden("parallelise.last", graph_text(last))
