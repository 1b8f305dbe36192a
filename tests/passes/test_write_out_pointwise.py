"""Operations that are pointwise in eval mode are written out; in training, or along another axis, they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfusion
from fxfusion.errors import RefusalCode
from fxfusion.graph import ops
from fxfusion.passes.write_out_pointwise import WriteOutPointwise
from tests.helpers import (
    HIDDEN,
    Block,
    CapturedGraph,
    How,
    Plain,
    Rms,
    Stack,
    apply,
    assert_fuses,
    capture,
    error_of,
    fuse,
    graph_text,
    parallel_form,
    randomise,
    refusal_with,
    run_graph,
    tokens,
)

WIDTH = 12


class Activation(nn.Module):
    """fc2(act(fc1(n))), the activation a module."""

    def __init__(self, act: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(HIDDEN, width), act, nn.Linear(width, HIDDEN)

    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(n)))


class Channels(nn.Module):
    """A batch norm over the last axis of three, as it is written for [batch, channels, seq], or over two."""

    def __init__(self, width: int, flat: bool) -> None:
        super().__init__()
        self.norm, self.flat = nn.BatchNorm1d(width), flat
        self.norm.running_mean = torch.linspace(-1, 1, width)
        self.norm.running_var = torch.linspace(0.5, 2, width)

    def forward(self, h: Tensor) -> Tensor:
        if self.flat:
            return self.norm(h.flatten(0, 1)).view_as(h)
        return self.norm(h.transpose(1, 2)).transpose(2, 1)


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "one slope": lambda width: nn.PReLU(),
    "random slope in eval": lambda width: nn.RReLU(),
    "batch norm of rows": lambda width: nn.Sequential(Channels(width, True), nn.GELU()),
    "batch norm of channels": lambda width: nn.Sequential(nn.GELU(), Channels(width, False)),
    "batch norm without weights": lambda width: nn.Sequential(nn.GELU(), Rows(width)),
}


class Rows(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, width))
        self.register_buffer("variance", torch.linspace(0.5, 2, width))

    def forward(self, h: Tensor) -> Tensor:
        return torch.batch_norm(h.flatten(0, 1), None, None, self.mean, self.variance, False, 0.1, 1e-3, False).view_as(
            h
        )


@pytest.mark.parametrize("how", ["symbolic", "export", "dynamo"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ffns_with(name: str, how: How) -> None:
    model = Stack([Block(Rms(HIDDEN), Activation(ACTIVATIONS[name](width), width)) for width in (8, 12)])
    assert_fuses(randomise(model), tokens(), how=how)


def test_a_slope_for_each_channel_of_rows() -> None:
    class RowSlopes(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.act = nn.PReLU(width)

        def forward(self, h: Tensor) -> Tensor:
            return self.act(h.flatten(0, 1)).view_as(h)

    assert_fuses(randomise(Stack([Block(Rms(HIDDEN), Activation(RowSlopes(w), w)) for w in (8, 12)])), tokens())


def test_a_slope_for_each_token_is_refused_for_what_it_is() -> None:
    model = randomise(Stack([Block(Rms(HIDDEN), Activation(nn.PReLU(5))) for _ in range(2)]))
    fused, report = fuse(model, tokens())
    assert not report.groups and torch.equal(fused(tokens()), model(tokens()))
    refusal_with(report.refusals, RefusalCode.OTHER_ACTIVATION, "differs by token")


def test_a_batch_norm_in_training_is_left_alone() -> None:
    def body(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x.flatten(0, 1), mean, variance, training=True)

    captured = written(body, tokens(), torch.zeros(HIDDEN).double(), torch.ones(HIDDEN).double())
    assert captured[1] == 0


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.rrelu(x, training=True),
        lambda x: F.rrelu(x * 1.0, 0.1, 0.2, False, True),
        lambda x: F.batch_norm(x, torch.zeros(5).double(), torch.ones(5).double()),
        lambda x: torch.prelu(x, torch.ones(5).double()),
    ],
)
def test_what_is_not_pointwise_is_left_alone(body: Callable[[Tensor], Tensor]) -> None:
    work, changed, captured = written(body, tokens())
    assert changed == 0 and graph_text(work) == graph_text(captured)


def test_what_is_written_out_is_the_same_and_written_once() -> None:
    x = tokens().requires_grad_()
    slope = torch.tensor([0.3], dtype=torch.float64)
    x.data[0, 0, :2] = torch.tensor([0.0, float("nan")])
    work, changed, captured = written(lambda x, w: torch.prelu(x, w) + F.rrelu(x), x, slope)
    assert changed == 2 and apply(work, WriteOutPointwise())[1][0].changed == 0
    (got,), (want,) = run_graph(work), run_graph(captured)
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    one, other = (torch.autograd.grad(value.nansum(), x)[0] for value in (got, want))
    assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_keep_their_dtype(dtype: torch.dtype) -> None:
    def body(x: Tensor) -> Tensor:
        return F.batch_norm(x.flatten(0, 1), torch.full((HIDDEN,), 0.5), torch.full((HIDDEN,), 2.0))

    work, changed, captured = written(body, tokens().to(dtype))
    (got,), (want,) = run_graph(work), run_graph(captured)
    assert changed == 1 and got.dtype == want.dtype
    assert error_of(got.double(), want.double()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_running_statistics_that_change_are_followed() -> None:
    blocks = [Block(Rms(HIDDEN), Activation(ACTIVATIONS["batch norm of rows"](8), 8)) for _ in range(2)]
    model, x = randomise(Stack(blocks)), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager"})
    with torch.no_grad():
        before = compiled(x)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(3.0)
        assert error_of(compiled(x), parallel_form(model, x)) < 1e-12 < error_of(before, parallel_form(model, x))


def test_golden(golden: Callable[[str, str], None]) -> None:
    model = randomise(Activation(nn.Sequential(nn.PReLU(), Channels(WIDTH, False))))
    captured = capture(model, tokens(), how="symbolic")
    golden("write_out_pointwise.before", graph_text(captured))
    golden("write_out_pointwise.after", graph_text(apply(captured, WriteOutPointwise())[0]))


def test_nothing_to_write_out_is_no_change() -> None:
    captured = capture(Plain(HIDDEN, WIDTH).double(), tokens())
    assert apply(captured, WriteOutPointwise())[1][0].changed == 0


def written(body: Callable[..., Tensor], *inputs: Any) -> tuple[CapturedGraph, int, CapturedGraph]:
    captured = capture(body, *inputs)
    work, records = apply(captured, WriteOutPointwise())
    assert not records[0].changed or "prelu" not in {ops.op_name(node) for node in work.module.graph.nodes}
    return work, records[0].changed, captured
