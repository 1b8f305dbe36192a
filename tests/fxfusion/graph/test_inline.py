"""Opening modules: the same function, every weight a node of its own, one node per tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxfusion.graph.inline import attribute, drop_unused_state, inline_modules


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))).eval()


def test_modules_are_opened_and_compute_the_same() -> None:
    model, x = net(), torch.rand(3, 4)
    gm = fx.symbolic_trace(model)
    assert inline_modules(gm) == 4
    gm.graph.lint()
    assert not [node for node in gm.graph.nodes if node.op == "call_module"]
    assert torch.equal(gm(x), model(x))
    targets = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    assert {"0.weight", "0.bias", "2.0.weight", "2.1.weight"} <= targets
    assert inline_modules(gm) == 0


def test_opened_nodes_know_their_module() -> None:
    gm = fx.symbolic_trace(net())
    inline_modules(gm)
    last = [node for node in gm.graph.nodes if node.op == "call_function"][-1]
    assert "2.1" in last.meta["nn_module_stack"]


def test_keyword_arguments_and_defaults_reach_the_opened_module() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, factor: float = 3.0, shift: float = 0.0) -> Tensor:
            return x * factor + shift

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x, shift=1.0)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = Outer()
    gm = fx.GraphModule(model, Leaves().trace(model))
    assert inline_modules(gm) == 1
    assert torch.equal(gm(torch.ones(2)), torch.full((2,), 4.0))


def test_a_module_that_cannot_be_traced_stays_whole() -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = nn.Sequential(Branching(), nn.Linear(4, 4))
    gm = fx.GraphModule(model, Leaves().trace(model))
    assert inline_modules(gm) == 1
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["0"]


def test_a_tied_weight_becomes_one_node() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.rand(3, 4)
    model[1].weight = model[0].weight
    gm = fx.symbolic_trace(model)
    inline_modules(gm)
    weights = [node for node in gm.graph.nodes if node.op == "get_attr" and "weight" in str(node.target)]
    assert len(weights) == 1 and len(weights[0].users) == 2
    assert torch.equal(gm(x), model(x))


def test_equal_values_in_two_tensors_stay_two_nodes() -> None:
    model = nn.Sequential(nn.Linear(4, 4, False), nn.Linear(4, 4, False))
    model[1].load_state_dict(model[0].state_dict())
    gm = fx.symbolic_trace(model)
    inline_modules(gm)
    assert len([node for node in gm.graph.nodes if node.op == "get_attr"]) == 2


def test_attribute_and_unused_state() -> None:
    model = net()
    gm = fx.symbolic_trace(model)
    inline_modules(gm)
    assert attribute(gm, "2.0.weight").shape == (4, 6)
    with pytest.raises(AttributeError):
        attribute(gm, "2.9.weight")
    output = next(node for node in gm.graph.nodes if node.op == "output")
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    output.args = (first,)
    gm.graph.eliminate_dead_code()
    drop_unused_state(gm)
    gm.recompile()
    assert {name for name, _ in gm.named_parameters()} == {"0.weight", "0.bias"}
    assert torch.equal(gm(torch.ones(4)), model[0](torch.ones(4)))
