"""The issue's list of bad input: a clear error, or an untouched graph with a reason; weights never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion import RefusalCode, explain, ffn_fusion, last_reports
from fxfusion.errors import CaptureError
from tests.helpers import Stack, assert_exact, parallel_form, refusal_with, stack, tokens

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=ffn_fusion, options={"compiler": "eager", **options})


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the state is what it was, NaNs included."""
    after = model.state_dict()
    return all(torch.equal(before[name].view(torch.int64), after[name].view(torch.int64)) for name in before)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_module_with_no_ffn() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    x, before = tokens(), state(model)
    assert torch.equal(compiled(model, strict=True)(x), model(x))
    assert not explain(model, x).groups and "Nothing to fuse" in str(explain(model, x))
    assert same_bits(model, before)


def test_a_graph_break_inside_an_ffn() -> None:
    class Breaks(Stack):
        def forward(self, x: Tensor) -> Tensor:
            first, second, *rest = self.layers
            x = first(x)
            n = second.norm(x)
            torch._dynamo.graph_break()
            x = x + second.ffn(n)
            for layer in rest:
                x = layer(x)
            return x

    model, x = Breaks(stack(count=4).layers), tokens()
    before = state(model)
    result = compiled(model)(x)
    reports = last_reports()[-2:]
    assert [len(report.groups) for report in reports] == [0, 1]
    assert_exact(result, parallel_form(model, x, [[2, 3]]), torch.float64)
    refusal_with(reports[0].refusals, RefusalCode.STREAM_READ)
    refusal_with(reports[1].refusals, RefusalCode.OTHER_ACTIVATION)
    assert same_bits(model, before)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 8)])
def test_empty_tensors_and_zero_length_batches(shape: tuple[int, ...]) -> None:
    model, x = stack(), torch.empty(shape, dtype=torch.float64)
    before = state(model)
    assert compiled(model, strict=True, verify="numeric")(x).shape == shape
    assert explain(model, x).groups
    full = tokens()
    assert_exact(compiled(model, strict=True)(full), parallel_form(model, full), torch.float64)
    assert same_bits(model, before)


@pytest.mark.parametrize("verify", ["structure", "numeric"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_pass_through(verify: str, value: float) -> None:
    model, x = stack(), tokens()
    with torch.no_grad():
        model.layers[1].ffn.down.weight[3, 2] = value
    before = state(model)
    got, wanted = compiled(model, strict=True, verify=verify)(x), parallel_form(model, x)
    assert torch.equal(got.isfinite(), wanted.isfinite()) and not wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert same_bits(model, before)


def test_inputs_that_do_not_fit_the_model() -> None:
    model = stack()
    with pytest.raises(CaptureError):
        explain(model, tokens(hidden=9))
    with pytest.raises(Exception, match="9"):
        compiled(model)(tokens(hidden=9))
    assert_exact(compiled(model)(tokens()), parallel_form(model, tokens()), torch.float64)


def test_public_names_are_all_there() -> None:
    for name in fxfusion.__all__:
        assert getattr(fxfusion, name) is not None
