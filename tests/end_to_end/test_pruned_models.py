"""Decoders as pruning leaves them: unequal FFN widths, layers without attention, without FFN, without both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import fxfusion
from fxfusion.errors import PlanError
from tests.end_to_end.eager_parallel import (
    llama,
    parallel_logits,
    randomised,
    relative,
    token_ids,
    with_widths,
    without_attention,
)

LIMIT, RED = 1e-5, 1e-3

# layer              0   1   2   3   4   5   6   7
WIDTHS = [64, 96, 32, 0, 64, 48, 0, 40]
WITHOUT_ATTENTION = [1, 2, 5, 6, 7]
CHAINS = [[0, 1, 2], [4, 5, 7]]


def pruned() -> Any:
    return without_attention(with_widths(llama(len(WIDTHS)), WIDTHS), WITHOUT_ATTENTION)


@torch.no_grad()
def logits(model: Any, cache: bool = False) -> Tensor:
    found: Tensor = model(input_ids=token_ids(), use_cache=cache).logits
    return found


def chains(model: Any) -> list[list[str]]:
    report = fxfusion.explain(model, input_ids=token_ids(), use_cache=False)
    return [[member.name for member in chain.members] for chain in report.chains]


def test_chains_go_over_layers_without_an_ffn_and_end_at_attention() -> None:
    assert chains(pruned()) == [[f"model.layers.{layer}.mlp" for layer in chain] for chain in CHAINS]


@pytest.mark.slow
def test_only_what_is_there_is_scored() -> None:
    model = pruned()
    scores = fxfusion.attention_scores(model, [token_ids()])
    assert [score.layer for score in scores.scores] == [0, 3, 4]
    matrix = fxfusion.dependency_matrix(model, [token_ids()])
    assert list(matrix.layers) == [0, 1, 2, 4, 5, 7]


@pytest.mark.slow
def test_a_measured_plan_is_fused() -> None:
    model = pruned()
    plan = fxfusion.make_plan(model, [token_ids()], drop=1, max_perplexity_increase=10.0)
    assert len(plan.dropped_attention) == 1 and plan.groups
    wanted = parallel_logits(model, plan.dropped_attention, plan.groups, token_ids(), plan.norm)
    fxfusion.fuse(model, plan)
    assert relative(logits(model), wanted) <= LIMIT


CASES: list[Any] = [
    ([], CHAINS, "fold"),
    pytest.param([], CHAINS, "last", marks=pytest.mark.slow),
    ([3, 4], [[0, 1, 2, 4, 5, 7]], "fold"),  # layers 3 and 6 are empty then, and stay
    pytest.param([3], [[0, 1, 2]], "fold", marks=pytest.mark.slow),
    pytest.param([4], [[4, 5, 7]], "last", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dropped, groups, norm", CASES)
def test_fused_and_back(dropped: Sequence[int], groups: Sequence[Sequence[int]], norm: Literal["fold", "last"]) -> None:
    model = pruned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = parallel_logits(model, dropped, groups, token_ids(), norm)
    unlike = randomised(pruned(), seed=8, only=f"layers.{groups[0][-1]}.mlp.down")
    other = parallel_logits(unlike, dropped, groups, token_ids(), norm)
    plan = fxfusion.FusionPlan(dropped_attention=list(dropped), groups=[list(group) for group in groups], norm=norm)

    fxfusion.fuse(model, plan)
    assert relative(logits(model), wanted) <= LIMIT < RED < relative(logits(model), other)
    gone = sum(len(group) - 1 for group in groups)
    assert len(model.model.layers) == model.config.num_hidden_layers == len(WIDTHS) - gone
    home = model.model.layers[model.config.fxfusion["fused"]["kept"].index(groups[0][0])]
    assert home.mlp.down_proj.in_features == sum(WIDTHS[layer] for layer in groups[0])
    prompt = token_ids()[:1]
    written = [model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)

    fxfusion.unfuse(model)
    after = model.state_dict()
    assert set(after) <= set(before) and len(model.model.layers) == len(WIDTHS)
    assert all(relative(after[name], before[name]) <= (1e-6 if norm == "fold" else 0.0) for name in after)


def test_an_ffn_that_was_pruned_away_is_in_no_group() -> None:
    model = pruned()
    before = logits(model)
    with pytest.raises(PlanError, match=r"group 0 \[5, 6, 7\]"):
        fxfusion.fuse(model, {"groups": [[5, 6, 7]]})
    assert torch.equal(logits(model), before)


def test_neighbouring_attentions_are_dropped_together() -> None:
    """Layer 3 is attention alone, so what its attention leaves is what the one of layer 4 reads."""
    model = pruned()
    wanted = parallel_logits(model, [3, 4], [], token_ids())
    fxfusion.drop_attention(model, [3, 4])
    assert relative(logits(model), wanted) <= LIMIT
    assert chains(model) == [[f"model.layers.{layer}.mlp" for chain in CHAINS for layer in chain]]
