"""FFNs that regroup their tokens, in each spelling and capture: whoever asks for a size is no reader of the stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fxfusion
from fxfusion.backend import forget_reports, last_reports
from tests.helpers import Gated, error_of, tokens

Ffn = Callable[[Tensor], Tensor]


def view_as(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x.reshape(-1, x.shape[-1])).view_as(x)


def reshape_as(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x.flatten(0, -2)).reshape_as(x)


def numbers(f: Ffn, x: Tensor) -> Tensor:
    batch, seq, hidden = x.shape[0], x.shape[1], x.shape[2]
    return x + f(x.view(batch * seq, hidden)).view(batch, seq, hidden)


def flat_stream(f: Ffn, x: Tensor) -> Tensor:
    shape, rows = x.shape, x.reshape(-1, x.size(-1))
    return (rows + f(rows)).view(shape)


def open_end(f: Ffn, x: Tensor) -> Tensor:
    rows = x.contiguous().view(-1, x.size(2))
    return (rows + f(rows)).view(x.size(0), x.size(1), -1)


def flat_twice(f: Ffn, x: Tensor) -> Tensor:
    return (x.flatten(0, -2) + f(x.flatten(0, -2))).unflatten(0, x.shape[:-1])


def strides(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x.contiguous().view(-1, x.stride(1))).view_as(x)


def unflatten(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x.flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[1]))


def expand_as(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x).expand_as(x)


def type_as(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x).type_as(x)


def to_like(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x).to(x)


def to_dtype(f: Ffn, x: Tensor) -> Tensor:
    return x + f(x).to(x.device, x.dtype)


SPELLINGS = (
    view_as,
    reshape_as,
    numbers,
    flat_stream,
    flat_twice,
    open_end,
    strides,
    unflatten,
    expand_as,
    type_as,
    to_like,
    to_dtype,
)


class Spelled(nn.Module):
    def __init__(self, spelling: Callable[[Ffn, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.layers = nn.ModuleList(Gated(8, 12 + 4 * index) for index in range(3)).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.spelling(layer, x)
        return x


def parallel(model: Spelled, x: Tensor) -> Tensor:
    return x + sum(layer(x) for layer in model.layers)


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), dynamic_shapes={"x": {0: Dim("batch"), 1: Dim("seq")}}).module()


def decomposed(model: nn.Module, x: Tensor) -> Any:
    sizes = {"x": {0: Dim("batch"), 1: Dim("seq")}}
    return torch.export.export(model, (x,), dynamic_shapes=sizes).run_decompositions().module()


def made(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return make_fx(model)(x)


def made_symbolic(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)


CAPTURES = (traced, exported, decomposed, made, made_symbolic)
UNTOLD = {(flat_twice, traced), (strides, traced)}  # a plain trace does not say that these are sizes of the input


@pytest.mark.parametrize(
    ("spelling", "capture"), [pair for pair in itertools.product(SPELLINGS, CAPTURES) if pair not in UNTOLD]
)
def test_captured_graphs(spelling: Any, capture: Callable[[nn.Module, Tensor], fx.GraphModule]) -> None:
    model, x = Spelled(spelling), tokens()
    fused, report = fxfusion.fuse_graph(capture(model, x), (x,))
    assert [len(group.members) for group in report.groups] == [3], [str(refusal) for refusal in report.refusals]
    others = [] if capture is made else [torch.randn(3, 7, 8, dtype=torch.float64)]
    for value in (x, *others):
        assert error_of(fused(value), parallel(model, value)) < 1e-12
    assert error_of(model(x), parallel(model, x)) > 1e-3, "the comparison shows nothing"


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_compiled_models(spelling: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    forget_reports()
    model, x = Spelled(spelling), tokens()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager"}, dynamic=dynamic)
    assert error_of(compiled(x), parallel(model, x)) < 1e-12
    (report,) = last_reports()
    assert [len(group.members) for group in report.groups] == [3], [str(refusal) for refusal in report.refusals]
    if dynamic:
        other = torch.randn(3, 7, 8, dtype=torch.float64)
        assert error_of(compiled(other), parallel(model, other)) < 1e-12
        assert len(last_reports()) == 1, "compiled again for another size"
