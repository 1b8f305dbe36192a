"""plan_groups: every policy field, and plans by number and by path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion import FusionPlan, RefusalCode, fuse_graph
from fxfusion.report import FusionReport
from tests.helpers import (
    Attention,
    Block,
    Gated,
    Rms,
    Stack,
    assert_exact,
    fuse,
    parallel_form,
    randomise,
    refusal_with,
    stack,
    tokens,
)
from tests.passes.test_find_chains import Layer


def groups(report: FusionReport) -> list[list[int]]:
    """Groups as the numbers of their layers."""
    return [[int(member.layer.rsplit(".", 1)[-1]) for member in group.members] for group in report.groups]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ({}, [[0, 1, 2, 3, 4]]),
        ({"keep_last": 1}, [[0, 1, 2, 3]]),
        ({"keep_last": 3}, [[0, 1]]),
        ({"keep_last": 4}, []),
        ({"keep_last": 9}, []),
        ({"min_members": 5}, [[0, 1, 2, 3, 4]]),
        ({"min_members": 6}, []),
        ({"min_members": 5, "keep_last": 1}, []),
        ({"max_members": 2}, [[0, 1], [2, 3]]),
        ({"max_members": 3}, [[0, 1, 2], [3, 4]]),
        ({"max_width": 24}, [[0, 1], [2, 3]]),
        ({"max_width": 35}, [[0, 1], [2, 3]]),
        ({"max_width": 36}, [[0, 1, 2], [3, 4]]),
        ({"max_width": 12}, []),
        ({"include_leading": False}, [[0, 1, 2, 3, 4]]),  # no mixer, so nothing leads
    ],
)
def test_policy_fields(policy: dict[str, Any], wanted: list[list[int]]) -> None:
    model, x = stack(count=5), tokens()
    fused, report = fuse(model, x, policy=policy)
    assert groups(report) == wanted
    assert_exact(fused(x), parallel_form(model, x, wanted), torch.float64)
    left = 5 - sum(map(len, wanted))
    assert len(report.refusals) == left, "every member that is in no group says why"
    assert {refusal.code for refusal in report.refusals} <= {RefusalCode.POLICY}


def test_paper_preset_leaves_the_first_and_the_last_out() -> None:
    model = Stack([Layer(True), *(Layer(False) for _ in range(4))])
    randomise(model)
    _, report = fuse(model, tokens(), policy="paper")
    assert groups(report) == [[1, 2, 3]] and report.groups[0].norm == "last"
    refusal_with(report.refusals, RefusalCode.POLICY, "include_leading is False")
    refusal_with(report.refusals, RefusalCode.POLICY, "keep_last is 1")
    _, report = fuse(model, tokens())
    assert groups(report) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("plan", [[[1, 2]], [[2, 1]], [["layers.1.ffn", "layers.2.ffn"]], [["layers.1.ffn", 2]]])
def test_plan_by_number_and_by_path(plan: list[list[Any]]) -> None:
    model, x = stack(count=5), tokens()
    fused, report = fuse(model, x, plan=FusionPlan(groups=plan))
    assert groups(report) == [[1, 2]]
    assert_exact(fused(x), parallel_form(model, x, [[1, 2]]), torch.float64)
    assert sorted(r.layer for r in report.refusals if r.code is RefusalCode.NOT_IN_PLAN) == [
        "layers.0.ffn",
        "layers.3.ffn",
        "layers.4.ffn",
    ]


def test_neighbouring_groups_of_one_chain() -> None:
    model, x = stack(count=5), tokens()
    for norm in ("fold", "last"):
        fused, report = fuse(model, x, plan={"groups": [[0, 1], [2, 3, 4]], "norm": norm}, verify="numeric")
        assert groups(report) == [[0, 1], [2, 3, 4]]
        assert_exact(fused(x), parallel_form(model, x, [[0, 1], [2, 3, 4]], norm=norm), torch.float64)


@pytest.mark.parametrize(
    ("group", "fragment"),
    [
        ([0, 2], "not neighbours"),
        ([1, 4], "4 is in no chain"),
        ([2, 3], "3 holds no FFN of this graph; FFNs were found in layers [0, 1, 2, 4] (token_mixing"),
        ([2, 99], "99 holds no FFN"),
        ([5, 6], "none of them holds an FFN"),
        (["model.layers.0.mlp", "model.layers.1.mlp"], "none of them holds an FFN"),
    ],
)
def test_plans_that_do_not_fit(group: list[Any], fragment: str) -> None:
    blocks = stack(count=4).layers
    model, x = Stack([blocks[0], blocks[1], blocks[2], Attention(), blocks[3]]), tokens()
    randomise(model)
    fused, report = fuse(model, x, plan=FusionPlan(groups=[group]))
    assert not report.groups and torch.equal(fused(x), model(x))
    code = RefusalCode.PLAN_ABSENT if fragment.startswith("none") else RefusalCode.PLAN_UNMATCHED
    refusal_with(report.refusals, code, fragment)


class Two(nn.Module):
    """A layer that holds two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(Rms(8), Gated()), Block(Rms(8), Gated())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_number_that_means_two_ffns_is_refused_and_their_paths_are_not() -> None:
    model, x = Stack([Two(), Two()]), tokens()
    randomise(model)
    fused, report = fuse(model, x, plan=FusionPlan(groups=[[0, 1]]))
    refusal_with(report.refusals, RefusalCode.PLAN_UNMATCHED, "0 means several FFNs (layers.0.one.ffn, layers.0.two")
    assert not report.groups and torch.equal(fused(x), model(x))
    _, report = fuse(model, x, plan=FusionPlan(groups=[["layers.0.one.ffn", "layers.0.two.ffn"]]))
    assert [len(group.members) for group in report.groups] == [2]


def test_members_of_a_plan_must_fit_each_other() -> None:
    model, x = Stack(Block(Rms(8), Gated(act=act)) for act in (F.silu, F.gelu, F.gelu)), tokens()
    randomise(model)
    fused, report = fuse(model, x, plan=FusionPlan(groups=[[0, 1]]))
    assert not report.groups and torch.equal(fused(x), model(x))
    refusal_with(report.refusals, RefusalCode.PLAN_UNMATCHED, "layers.1.ffn: differs from layers.0.ffn: gelu here")
    _, report = fuse(model, x, plan=FusionPlan(groups=[[1, 2]]))
    assert groups(report) == [[1, 2]]


def test_a_policy_leaves_what_was_fused_before_and_a_plan_may_name_it() -> None:
    model, x = stack(count=5), tokens()
    once, report = fuse(model, x, policy={"max_members": 2})
    assert groups(report) == [[0, 1], [2, 3]]
    twice, report = fuse_graph(once, [x])
    assert not report.groups and torch.equal(twice(x), once(x))
    refusal_with(report.refusals, RefusalCode.POLICY, "layers.3 is the work of an earlier fusion")
    wide = [member.name for member in report.chains[0].members]
    fused, report = fuse_graph(once, [x], plan=FusionPlan(groups=[wide[:2]]))
    assert [len(group.members) for group in report.groups] == [2]
    assert_exact(fused(x), parallel_form(model, x, [[0, 1, 2, 3]]), torch.float64)


def test_one_bad_group_does_not_stop_the_others() -> None:
    model, x = stack(count=4), tokens()
    fused, report = fuse(model, x, plan=FusionPlan(groups=[[0, 1], [2, 9]]))
    assert groups(report) == [[0, 1]]
    assert_exact(fused(x), parallel_form(model, x, [[0, 1]]), torch.float64)
    refusal_with(report.refusals, RefusalCode.PLAN_UNMATCHED, "group 1")
