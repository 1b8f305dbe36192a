"""planned: a model under a plan, by graph, equals the same plan computed in eager PyTorch by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxfusion.analysis.planned import PlannedModel, analyse_without
from fxfusion.errors import NotFusedError, PlanError
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from tests.helpers import assert_exact
from tests.tiny_lm import TinyLm, ids


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize(
    ("dropped", "groups"),
    [
        ((), ()),
        ((2, 3), ()),
        ((2, 3), ((1, 2, 3),)),
        ((1, 2, 4, 5), ((1, 2), (3, 4, 5))),
        ((0, 1, 2, 3, 4, 5), ((0, 1, 2, 3, 4, 5),)),
    ],
)
def test_a_plan_by_graph_is_the_plan_by_hand(dropped: Any, groups: Any, norm: Any) -> None:
    model = TinyLm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planned = PlannedModel(TracedModel(model), FusionPlan(dropped_attention=dropped, groups=groups, norm=norm))
    for tokens in (ids(), ids(1, 4, seed=3)):  # two shapes: two graphs, one set of packed weights
        assert_exact(planned(tokens), model.planned(tokens, dropped, groups, norm), torch.float64)
        if dropped:
            assert not torch.allclose(planned(tokens), model(tokens), rtol=1e-2), "the plan changes the model"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("removed", "groups"), [((3,), ()), ((0, 3, 4), ()), ((5,), ()), ((2,), ((3, 4),))])
def test_layers_are_removed_by_graph_as_by_hand(removed: Any, groups: Any) -> None:
    model, tokens = TinyLm(), ids()
    dropped = tuple(layer for group in groups for layer in group[1:])
    plan = FusionPlan(removed=removed, groups=groups, dropped_attention=dropped)
    planned = PlannedModel(TracedModel(model), plan)(tokens)
    kept = [layer for layer in range(6) if layer not in removed]
    by_hand = TinyLm()
    by_hand.layers = nn.ModuleList(model.layers[layer] for layer in kept)
    places = [[kept.index(layer) for layer in group] for group in groups]
    assert_exact(planned, by_hand.planned(tokens, [kept.index(layer) for layer in dropped], places), torch.float64)
    assert not torch.allclose(planned, model.planned(tokens, dropped, groups), rtol=1e-2), "removing changes the model"


def test_the_two_norms_are_told_apart() -> None:
    model, tokens = TinyLm(), ids()
    plans = [FusionPlan(dropped_attention=(2, 3), groups=((1, 2, 3),), norm=norm) for norm in ("fold", "last")]
    fold, last = (PlannedModel(TracedModel(model), plan)(tokens) for plan in plans)
    assert not torch.allclose(fold, last, rtol=1e-3)


def test_what_cannot_be_had_is_an_error() -> None:
    traced, tokens = TracedModel(TinyLm()), ids()
    with pytest.raises(PlanError, match=r"no attention to drop in layers \[9\]"):
        PlannedModel(traced, FusionPlan(dropped_attention=(2, 9)))(tokens)
    with pytest.raises(NotFusedError, match="does not fit"):
        PlannedModel(traced, FusionPlan(dropped_attention=(2,), groups=((1, 2, 3),)))(tokens)


def test_chains_follow_what_is_dropped() -> None:
    graph = TracedModel(TinyLm()).graph(ids())
    chains = [[ffn.name for ffn in chain.members] for chain in analyse_without(graph, (2, 3)).chains]
    assert ["layers.1.mlp.ffn", "layers.2.mlp.ffn", "layers.3.mlp.ffn"] in chains
    assert all(len(chain) == 1 for chain in ([f.name for f in c.members] for c in analyse_without(graph, ()).chains))


def test_the_report_says_what_was_fused() -> None:
    planned = PlannedModel(TracedModel(TinyLm()), FusionPlan(dropped_attention=(2, 3), groups=((1, 2, 3),)))
    report = planned.report(ids())
    assert [len(group.members) for group in report.groups] == [3]
