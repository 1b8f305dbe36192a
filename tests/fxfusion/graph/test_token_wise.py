"""The judge of regions: tokens by themselves, and channels by themselves where that is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfusion.compiler.capture import captured_from_graph
from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph.token_wise import check_token_wise

Region = Callable[[Tensor, Tensor], Any]


class Of(nn.Module):
    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, x: Tensor, c: Tensor) -> Any:
        return self.region(x, c)


def judge(region: Region, x: Tensor, c: Tensor, *, pointwise_only: bool) -> None:
    """Raises `Refused`. `c` is a constant."""
    graph = captured_from_graph(fx.symbolic_trace(Of(region)), (x, c)).module.graph
    inputs = {node: node.name == "x" for node in graph.nodes if node.op == "placeholder"}
    check_token_wise(
        [node for node in graph.nodes if node.op.startswith("call")], inputs, pointwise_only=pointwise_only
    )


TOKEN_WISE: dict[str, Region] = {
    "scale": lambda x, c: x * c,
    "softmax over channels": lambda x, c: x.softmax(-1),
    "layer norm": lambda x, c: F.layer_norm(x, (4,), c, c),
    "normalise": lambda x, c: F.normalize(x, dim=-1),
    "variance": lambda x, c: x / x.var(-1, keepdim=True),
    "regrouped": lambda x, c: (x.flatten(0, 1) * c).view(4, 4, 4),
    "reduced and spread": lambda x, c: x - x.mean(-1).unsqueeze(-1),
    "reduced, closed and opened": lambda x, c: x - x.mean(-1, keepdim=True).squeeze(-1).unsqueeze(-1),
    "cut": lambda x, c: x[..., :2].chunk(2, -1)[0],
    "filled": lambda x, c: x.masked_fill(x > 0, 0.0) + torch.zeros_like(x),
}
MIXING: dict[str, tuple[Region, RefusalCode]] = {
    "mean over tokens": (lambda x, c: x.mean(1, keepdim=True), RefusalCode.TOKEN_MIXING),
    "mean over everything": (lambda x, c: x - x.mean(), RefusalCode.TOKEN_MIXING),
    "reduced, spread over the wrong axis": (lambda x, c: x - x.mean(-1), RefusalCode.TOKEN_MIXING),
    "reduced, opened at the wrong place": (lambda x, c: x - x.mean(-1).unsqueeze(1), RefusalCode.TOKEN_MIXING),
    "reduced, tokens made channels": (lambda x, c: x.mean(-1).unsqueeze(0).softmax(-1), RefusalCode.TOKEN_MIXING),
    "softmax over tokens": (lambda x, c: x.softmax(-2), RefusalCode.TOKEN_MIXING),
    "transpose": (lambda x, c: x.transpose(0, 1), RefusalCode.UNKNOWN_OP),
    "joined channels": (lambda x, c: x.view(4, 16), RefusalCode.TOKEN_MIXING),
    "one token for all": (lambda x, c: x - x[:, :1], RefusalCode.TOKEN_MIXING),
    "another batch axis": (lambda x, c: x + x[None], RefusalCode.TOKEN_MIXING),
    "index": (lambda x, c: x[:, [3, 2, 1, 0]], RefusalCode.UNKNOWN_OP),
    "a constant per token": (lambda x, c: x * c[:, None], RefusalCode.OTHER_ACTIVATION),
    "a constant with more axes": (lambda x, c: x * c[None, None, None], RefusalCode.OTHER_ACTIVATION),
    "flip": (lambda x, c: x.flip(0), RefusalCode.UNKNOWN_OP),
    "cat": (lambda x, c: torch.cat([x, x], -1), RefusalCode.UNKNOWN_OP),
    "matmul": (lambda x, c: x @ x.mT, RefusalCode.UNKNOWN_OP),
    "detach": (lambda x, c: x.detach(), RefusalCode.MODE_CHANGE),
    "data": (lambda x, c: x.data * 2, RefusalCode.MODE_CHANGE),
}
POINTWISE_ONLY: dict[str, Region] = {
    "softmax over channels": lambda x, c: x.softmax(-1),
    "norm": lambda x, c: F.layer_norm(x, (4,)),
    "mean over channels": lambda x, c: x - x.mean(-1, keepdim=True),
    "cut": lambda x, c: x[..., :2],
    "glu": lambda x, c: F.glu(x),
    "widths that meet": lambda x, c: x * x[..., :1],
    "a tensor of its own width": lambda x, c: x * x.new_ones(4, 4, 4),
    "cumulative": lambda x, c: x.cumsum(-1),
}


@pytest.fixture
def square() -> tuple[Tensor, Tensor]:
    """Batch = sequence = channels = 4: sizes tell nothing."""
    return torch.rand(4, 4, 4), torch.rand(4)


@pytest.mark.parametrize("region", TOKEN_WISE.values(), ids=TOKEN_WISE)
def test_token_wise(region: Region, square: tuple[Tensor, Tensor]) -> None:
    judge(region, *square, pointwise_only=False)


@pytest.mark.parametrize("case", MIXING.values(), ids=MIXING)
def test_mixing(case: tuple[Region, RefusalCode], square: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(Refused) as caught:
        judge(case[0], *square, pointwise_only=False)
    assert caught.value.code is case[1], caught.value.message


@pytest.mark.parametrize("region", POINTWISE_ONLY.values(), ids=POINTWISE_ONLY)
def test_channels_that_see_each_other(region: Region, square: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(Refused) as caught:
        judge(region, *square, pointwise_only=True)
    assert caught.value.code is RefusalCode.NOT_POINTWISE, caught.value.message


def test_values_of_other_widths_do_not_meet_where_channels_stay_apart() -> None:
    """One channel of `gate` would reach all of `x`; where channels may see each other, that is fine."""
    graph = fx.Graph()
    x, gate = graph.placeholder("x"), graph.placeholder("gate")
    x.meta["example_value"], gate.meta["example_value"] = torch.rand(2, 3, 4), torch.rand(2, 3, 1)
    product = graph.call_function(torch.mul, (x, gate))
    check_token_wise([product], {x: True, gate: True})
    with pytest.raises(Refused, match="joins values of different widths") as caught:
        check_token_wise([product], {x: True, gate: True}, pointwise_only=True)
    assert caught.value.code is RefusalCode.NOT_POINTWISE


def test_a_module_that_was_not_opened_cannot_be_judged() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.rand(2, 3, 4)
    called = graph.call_module("closed", (x,))
    with pytest.raises(Refused, match="the module closed could not be opened"):
        check_token_wise([called], {x: True})


def reversed_by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy()[::-1].copy())


@pytest.mark.parametrize(("function", "runs"), [(torch.sin, True), (reversed_by_numpy, False)])
def test_a_function_that_needs_real_numbers_cannot_be_judged(function: Callable[[Tensor], Tensor], runs: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.rand(2, 3, 4)
    result = graph.call_function(function, (x,))
    if runs:
        check_token_wise([result], {x: True})
        return
    with pytest.raises(Refused, match="reversed_by_numpy cannot be looked into") as caught:
        check_token_wise([result], {x: True})
    assert caught.value.code is RefusalCode.UNKNOWN_OP and caught.value.node is result


def test_the_refusal_names_the_node_that_decided() -> None:
    with pytest.raises(Refused) as caught:
        judge(lambda x, c: (x * 2).softmax(1) + 1, torch.rand(2, 3, 4), torch.rand(4), pointwise_only=False)
    assert str(caught.value.node) == "softmax"


def test_inference_mode_makes_no_difference() -> None:
    with torch.inference_mode():
        x, c = torch.rand(2, 3, 4), torch.rand(4)
    graph = captured_from_graph(fx.symbolic_trace(Of(TOKEN_WISE["layer norm"])), (x.clone(), c.clone())).module.graph
    inputs = {node: node.name == "x" for node in graph.nodes if node.op == "placeholder"}
    with torch.inference_mode():
        check_token_wise([node for node in graph.nodes if node.op.startswith("call")], inputs)
