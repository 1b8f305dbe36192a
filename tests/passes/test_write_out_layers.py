"""The one operation for a whole encoder layer is written out where that is exact, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.backend import forget_reports, last_reports
from fxfusion.errors import RefusalCode
from fxfusion.passes.write_out_layers import LAYER, WriteOutLayers
from tests.helpers import (
    HIDDEN,
    apply,
    capture,
    error_of,
    graph_text,
    match,
    nodes_named,
    randomise,
    refusal_with,
    run_graph,
    tokens,
)


def encoder(activation: str = "gelu", norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        HIDDEN, 2, 12, batch_first=True, norm_first=norm_first, activation=activation, layer_norm_eps=1e-3
    )
    return randomise(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_layers_in_eval_mode(activation: str) -> None:
    captured = capture(encoder(activation), tokens())
    assert len(nodes_named(captured, LAYER)) == 3
    work, records = apply(captured, WriteOutLayers())
    assert records[0].changed == 3 and not nodes_named(work, LAYER)
    assert error_of(run_graph(work)[0], run_graph(captured)[0]) < 1e-12
    assert apply(work, WriteOutLayers())[1][0].changed == 0


def test_a_window_over_them() -> None:
    model, x = encoder(), tokens()
    want = x
    for layer in model.layers:
        want = want + layer._sa_block(layer.norm1(want), None, None)
    want = want + sum(layer._ff_block(layer.norm2(want)) for layer in model.layers)
    torch._dynamo.reset()
    forget_reports()
    options = {"compiler": "eager", "policy": {"windows": [[0, 1, 2]]}, "strict": True, "verify": "numeric"}
    assert error_of(torch.compile(model, backend=fxfusion.ffn_fusion, options=options)(x), want) < 1e-12
    assert [len(group.members) for report in last_reports() for group in report.groups] == [3]


def post_norm(x: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return encoder(norm_first=False), (x,)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder().layers

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x


def masked(x: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Padded().eval(), (x, torch.tensor([[False] * 5, [False] * 4 + [True]]))


@pytest.mark.parametrize("case", [post_norm, masked])
def test_other_layers_stay_and_are_refused(case: Callable[[Tensor], tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    model, inputs = case(tokens())
    captured = capture(model, *inputs)
    work, records = apply(captured, WriteOutLayers())
    assert records[0].changed == 0 and graph_text(work) == graph_text(captured)
    assert len(nodes_named(captured, LAYER)) == 3
    refusal_with(match(model, *inputs).refusals, RefusalCode.HIGHER_ORDER, "a whole layer in one operation")


def test_golden(golden: Callable[[str, str], None]) -> None:
    captured = capture(encoder().layers[0], tokens())
    golden("write_out_layers.before", graph_text(captured))
    golden("write_out_layers.after", graph_text(apply(captured, WriteOutLayers())[0]))
