"""pipeline: explain and fuse_graph on every kind of graph, and on none of them by accident."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfusion
from fxfusion import FusionPlan, explain, fuse_graph
from fxfusion.errors import OptionError, PlanError
from tests.helpers import How, Plain, Stack, assert_exact, capture, error_of, parallel_form, stack, tokens


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic"])
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_fuse_graph_takes_every_kind_of_graph(how: How, norm: Any) -> None:
    model, x = stack(Plain, nn.LayerNorm, widths=(4, 12, 20)), tokens()
    if how == "dynamo":
        captured = capture(model, x)
        gm, inputs = captured.module, captured.inputs
    else:
        gm = torch.export.export(model, (x,)).module() if how == "export" else fx.symbolic_trace(model)
        inputs = (x,)
    text, state = str(gm.graph), {name: value.clone() for name, value in model.state_dict().items()}
    fused, report = fuse_graph(gm, inputs, policy={"norm": norm}, verify="numeric")
    result = fused(*inputs)
    result = result[0] if isinstance(result, tuple) else result
    assert_exact(result, parallel_form(model, x, norm=norm), torch.float64)
    assert error_of(result, model(x)) > 1e-2
    assert report.verifications[0]["passed"]
    assert str(gm.graph) == text, "the caller's graph was edited"
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert report.before is not None and report.after is fused


def test_explain_computes_nothing_and_works_on_meta() -> None:
    real, x = stack(Plain, nn.LayerNorm, count=4), tokens()
    report, without = explain(real, x), explain(stack(Plain, nn.LayerNorm, count=4).to("meta"), x.to("meta"))
    assert len(report.groups) == len(without.groups) == 1
    assert [member.name for member in without.groups[0].members] == [m.name for m in report.groups[0].members]
    assert [len(chain.members) for chain in without.chains] == [4]
    assert without.after is not None and without.before is not None
    assert len(without.after.graph.nodes) < len(without.before.graph.nodes)


def test_fuse_graph_works_on_meta() -> None:
    model, x = stack().to("meta"), tokens().to("meta")
    fused, report = fuse_graph(fx.symbolic_trace(model), [x])
    assert len(report.groups) == 1 and fused(x).shape == x.shape
    assert all(value.device.type == "meta" for value in fused.parameters())


def test_policy_and_plan_together_are_an_error() -> None:
    model, x, plan = stack(), tokens(), FusionPlan(groups=[[0, 1]])
    with pytest.raises(OptionError, match="policy and plan were both given"):
        explain(model, x, policy="paper", plan=plan)
    with pytest.raises(OptionError, match="policy and plan were both given"):
        fuse_graph(fx.symbolic_trace(model), [x], policy="paper", plan=plan)
    with pytest.raises(PlanError, match="unknown field"):
        explain(model, x, plan={"grups": []})


class Broken(Stack):
    """A graph break after the second block."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth = self.layers
        x = second(first(x))
        torch._dynamo.graph_break()
        return fifth(fourth(third(x)))


def test_a_graph_break_gives_several_graphs() -> None:
    model, x = Broken(stack(count=5).layers), tokens()
    torch._dynamo.reset()
    report = explain(model, x)
    assert len(report.graphs) == 2 and "2 graphs" in report.notes[0]
    assert [len(group.members) for group in report.groups] == [2, 3]
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})
    assert_exact(run(x), parallel_form(model, x, [[0, 1], [2, 3, 4]]), torch.float64)


def test_explain_passes_keyword_arguments_on() -> None:
    class Keyword(Stack):
        def forward(self, *, stream: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(stream * scale)

    report = explain(Keyword(stack().layers), stream=tokens(), scale=0.5)
    assert len(report.groups) == 1


def test_nothing_fused_returns_the_graph_as_it_was() -> None:
    model, x = stack(count=1), tokens()
    gm = fx.symbolic_trace(model)
    fused, report = fuse_graph(gm, [x])
    assert not report.groups and torch.equal(fused(x), gm(x))
    assert report.after is report.before


def test_history_names_every_pass_with_its_kind() -> None:
    _, report = fuse_graph(fx.symbolic_trace(stack()), [tokens()])
    names = [record["pass"] for record in report.main.history]
    assert names[-4:] == ["parallelise", "concatenate", "concat_parallel_mixers", "lift_weights"]
    assert names[:2] == ["specialise_numbers", "drop_no_ops"]
    assert [r["pass"] for r in report.main.history if not r["exact"]] == ["parallelise"]
    assert all(record["seconds"] >= 0 for record in report.main.history)
