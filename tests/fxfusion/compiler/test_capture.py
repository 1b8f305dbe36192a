"""capture: what the user has becomes a graph that knows its weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfusion
from fxfusion.compiler.capture import CapturedGraph, capture_model, captured_from_graph
from fxfusion.errors import CaptureError
from fxfusion.graph import ops
from tests.helpers import HIDDEN, How, capture, error_of, parallel_form, run_graph, stack, tokens


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic"])
def test_every_weight_is_known_and_every_node_has_a_value(how: How) -> None:
    model, x = stack(), tokens()
    found = capture(model, x, how=how)
    tensors = {id(value) for value in found.values.values()} | {value.data_ptr() for value in found.values.values()}
    for parameter in model.parameters():
        assert id(parameter) in tensors or parameter.data_ptr() in tensors
    assert not found.opaque
    for node in found.module.graph.nodes:
        if node.op in ("call_function", "call_method"):
            assert ops.tensor_value(node) is not None or ops.is_shape_value(node), node
    result = run_graph(found)
    assert torch.equal(result[0] if isinstance(result, tuple) else result, model(x))


def test_a_copy_can_be_edited_without_harm() -> None:
    found = capture(stack(), tokens())
    text = str(found.module.graph)
    work = found.copy()
    for node in reversed(list(work.module.graph.nodes)):
        if node.op == "output":
            node.args = ((next(n for n in work.module.graph.nodes if n.op == "placeholder"),),)
    work.module.graph.eliminate_dead_code()
    assert str(found.module.graph) == text != str(work.module.graph)
    assert work.weights == found.weights and work.values is found.values


def test_weights_by_type_and_source_not_by_name() -> None:
    """A plain input whose name looks like a weight is none; a tied weight is one."""
    linear = nn.Linear(8, 8, dtype=torch.float64)

    def model(weight: Tensor, x: Tensor) -> Tensor:
        return linear(x) + x @ weight + linear(x)

    found = capture(model, torch.randn(8, 8, dtype=torch.float64), tokens())
    assert len(found.weights) == 2
    assert {id(value) for value in found.values.values()} == {id(linear.weight), id(linear.bias)}


def test_subclasses_sparse_and_quantised_weights_are_opaque() -> None:
    class Odd(Tensor):
        pass

    odd, sparse = torch.ones(2, 2).as_subclass(Odd), torch.eye(2).to_sparse()
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    graph = fx.Graph()
    root = nn.Module()
    for name, value in {"odd": odd, "sparse": sparse, "quantised": quantised, "plain": torch.ones(2)}.items():
        root.register_buffer(name, value)
        graph.get_attr(name)
    graph.output(())
    from fxfusion.compiler.capture import capture_dynamo

    found: CapturedGraph = capture_dynamo(fx.GraphModule(root, graph), [])
    assert set(found.opaque) == {"odd", "sparse", "quantised"}
    assert "Odd" in found.opaque["odd"] and "layout" in found.opaque["sparse"]


def test_wrong_example_inputs() -> None:
    gm = fx.symbolic_trace(stack())
    with pytest.raises(CaptureError, match="1 inputs, 2 example inputs"):
        captured_from_graph(gm, [tokens(), tokens()])
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        captured_from_graph(gm, [tokens(hidden=9)])


def test_models_that_cannot_be_captured() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("not today")

    with pytest.raises(CaptureError, match="not today"):
        capture_model(fails, [tokens()], {})
    with pytest.raises(CaptureError, match="no graph"):
        capture_model(lambda x: 3, [tokens()], {})


def test_capture_computes_nothing() -> None:
    """Weights full of NaN leave no trace: answers are zeros of the right shape."""
    model = stack()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        seen.append(y)
        return y

    graphs, notes = capture_model(forward, [tokens()], {})
    assert len(graphs) >= 1 and seen[0].shape == tokens().shape
    assert not seen[0].isnan().any()


def test_a_capture_keeps_no_weight_alive() -> None:
    model = stack()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    graphs, _ = capture_model(model, (tokens(),), {})
    assert any(ref() is value for ref in weights for value in graphs[0].values.values())
    del model, graphs
    gc.collect()
    assert all(ref() is None for ref in weights)


def gated(x: Tensor, weights: list[Tensor]) -> Tensor:
    gain, gate, up, down = weights
    n = F.rms_norm(x, (HIDDEN,), gain)
    return x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)


def plain_call(x: Tensor, members: list[list[Tensor]]) -> Tensor:
    for weights in members:
        x = gated(x, weights)
    return x


@pytest.mark.parametrize("prompt", [True, False])
def test_a_parameter_that_a_linear_layer_takes_as_its_input_is_no_weight(prompt: bool) -> None:
    """Weights that are arguments, all of them parameters of no module; the input too, where it is a prompt."""
    shapes = [(HIDDEN,), (6, HIDDEN), (6, HIDDEN), (HIDDEN, 6)]
    members = [[nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes] for _ in range(2)]
    x = nn.Parameter(tokens()) if prompt else tokens()
    torch._dynamo.reset()
    (captured,), _ = capture_model(plain_call, (x, members), {})
    assert len(captured.weights) == 8 and not any(value is x for value in captured.values.values())
    (report,) = fxfusion.explain(plain_call, x, members).graphs
    assert [len(group.members) for group in report.groups] == [2]


def test_a_soft_prompt_gets_its_gradient() -> None:
    model, prompt = stack(), nn.Parameter(tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager"})
    (got,) = torch.autograd.grad(compiled(prompt).sum(), prompt)
    (want,) = torch.autograd.grad(parallel_form(model, prompt).sum(), prompt)
    assert error_of(got, want) < 1e-12
    with torch.no_grad():
        prompt.add_(1.0)
    assert error_of(compiled(prompt), parallel_form(model, prompt)) < 1e-12
