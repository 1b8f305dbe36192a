"""Operations that have simpler ones in eval mode are written out; in training, or along another axis, they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfusion
from fxfusion.backend import forget_reports, last_reports
from fxfusion.errors import RefusalCode
from fxfusion.passes.write_out import LAYER, WriteOut
from tests.helpers import (
    HIDDEN,
    Block,
    CapturedGraph,
    How,
    Of,
    Rms,
    Stack,
    apply,
    assert_fuses,
    assert_not_fused,
    capture,
    error_of,
    graph_text,
    match,
    nodes_named,
    parallel_form,
    randomise,
    refusal_with,
    run_graph,
    tokens,
)

WIDTH = 12


def of_rows(part: nn.Module) -> Of:
    """The module on [tokens, width]."""
    return Of(lambda m, h: m.part(h.flatten(0, 1)).view_as(h), part=part)


def of_channels(part: nn.Module) -> Of:
    """The module on [batch, width, seq]."""
    return Of(lambda m, h: m.part(h.transpose(1, 2)).transpose(2, 1), part=part)


def statistics(width: int) -> dict[str, Tensor]:
    return {"mean": torch.linspace(-1, 1, width), "variance": torch.linspace(0.5, 2, width)}


def batch_norm(width: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(width)
    norm.running_mean, norm.running_var = statistics(width).values()
    return norm


def bare_norm(m: Any, h: Tensor) -> Tensor:
    flat = h.flatten(0, 1)
    return torch.batch_norm(flat, None, None, m.mean, m.variance, False, 0.1, 1e-3, False).view_as(h)


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "one slope": lambda width: nn.PReLU(),
    "a slope for each channel of rows": lambda width: of_rows(nn.PReLU(width)),
    "random slope in eval": lambda width: nn.RReLU(),
    "batch norm of rows": lambda width: nn.Sequential(of_rows(batch_norm(width)), nn.GELU()),
    "batch norm of channels": lambda width: nn.Sequential(nn.GELU(), of_channels(batch_norm(width))),
    "batch norm without weights": lambda width: nn.Sequential(nn.GELU(), Of(bare_norm, **statistics(width))),
}


def ffns(act: Callable[[int], nn.Module], widths: tuple[int, ...] = (8, 12)) -> Stack:
    return randomise(Stack([Block(Rms(HIDDEN), activated(act(width), width)) for width in widths]))


def activated(act: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, width), act, nn.Linear(width, HIDDEN))


@pytest.mark.parametrize("how", ["symbolic", "export", "dynamo"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ffns_with(name: str, how: How) -> None:
    assert_fuses(ffns(ACTIVATIONS[name]), tokens(), how=how)


def test_a_slope_for_each_token_is_refused_for_what_it_is() -> None:
    assert_not_fused(ffns(lambda _: nn.PReLU(5)), (tokens(),), RefusalCode.OTHER_ACTIVATION, "differs by token")


ZEROS, ONES = torch.zeros(HIDDEN).double(), torch.ones(HIDDEN).double()


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.rrelu(x, training=True),
        lambda x: F.rrelu(x * 1.0, 0.1, 0.2, False, True),
        lambda x: F.batch_norm(x, ZEROS[:5].clone(), ONES[:5].clone()),
        lambda x: F.batch_norm(x.flatten(0, 1), ZEROS.clone(), ONES.clone(), training=True),
        lambda x: torch.prelu(x, ONES[:5].clone()),
        lambda x: F.gelu(x),
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
    assert changed == 2 and apply(work, WriteOut())[1][0].changed == 0
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
    model, x = ffns(ACTIVATIONS["batch norm of rows"], (8, 8)), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager"})
    with torch.no_grad():
        before = compiled(x)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(3.0)
        assert error_of(compiled(x), parallel_form(model, x)) < 1e-12 < error_of(before, parallel_form(model, x))


def written(body: Callable[..., Tensor], *inputs: Any) -> tuple[CapturedGraph, int, CapturedGraph]:
    captured = capture(body, *inputs)
    work, records = apply(captured, WriteOut())
    assert not records[0].changed or not nodes_named(work, "prelu")
    return work, records[0].changed, captured


# --- whole layers in one operation ---------------------------------------------------------------------


def encoder(activation: str = "gelu", norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        HIDDEN, 2, WIDTH, batch_first=True, norm_first=norm_first, activation=activation, layer_norm_eps=1e-3
    )
    return randomise(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_layers_in_eval_mode(activation: str) -> None:
    captured = capture(encoder(activation), tokens())
    assert len(nodes_named(captured, LAYER)) == 3
    work, records = apply(captured, WriteOut())
    assert records[0].changed == 3 and not nodes_named(work, LAYER)
    assert error_of(run_graph(work)[0], run_graph(captured)[0]) < 1e-12
    assert apply(work, WriteOut())[1][0].changed == 0


@torch.no_grad()
def test_a_window_over_layers() -> None:
    model, x = encoder(), tokens()
    want = x
    for layer in model.layers:
        want = want + layer._sa_block(layer.norm1(want), None, None)
    want = want + sum(layer._ff_block(layer.norm2(want)) for layer in model.layers)
    torch._dynamo.reset()
    forget_reports()
    options = {"compiler": "eager", "policy": {"windows": [[0, 1, 2]]}, "strict": True, "verify": "numeric"}
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options=options)
    assert error_of(run(x), want) < 1e-12
    assert [len(group.members) for report in last_reports() for group in report.groups] == [3]


@torch.no_grad()
def test_layers_whose_width_is_a_symbol_stay_and_are_refused() -> None:
    model, x = encoder(), tokens()
    torch._dynamo.reset()
    forget_reports()
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager"}, dynamic=True)
    assert torch.equal(run(x), model(x))
    (report,) = last_reports()
    refusal_with(report.refusals, RefusalCode.HIGHER_ORDER, "a symbolic width")


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder().layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 4 + [True]]))
        return x


@pytest.mark.parametrize("build", [lambda: encoder(norm_first=False), lambda: Padded().eval()])
@torch.no_grad()
def test_other_layers_stay_and_are_refused(build: Callable[[], nn.Module]) -> None:
    work, changed, captured = written(build(), tokens())
    assert changed == 0 and graph_text(work) == graph_text(captured)
    assert len(nodes_named(captured, LAYER)) == 3
    refusal_with(match(build(), tokens()).refusals, RefusalCode.HIGHER_ORDER, "a whole layer in one operation")


@torch.no_grad()
def test_golden(golden: Callable[[str, str], None]) -> None:
    act = activated(nn.Sequential(nn.PReLU(), of_channels(batch_norm(WIDTH))), WIDTH)
    for name, captured in (
        ("write_out.pointwise", capture(randomise(act), tokens(), how="symbolic")),
        ("write_out.layer", capture(encoder().layers[0], tokens())),
    ):
        golden(f"{name}.before", graph_text(captured))
        golden(f"{name}.after", graph_text(apply(captured, WriteOut())[0]))
