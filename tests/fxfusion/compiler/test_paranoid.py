"""verify="paranoid": the first calls of a compiled graph are compared, whatever went wrong since the compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion import ffn_fusion, last_reports
from fxfusion.compiler.packing import _alive
from fxfusion.compiler.paranoid import ParanoidCallable
from fxfusion.errors import OptionError, VerificationError
from tests.fxfusion.compiler.test_verify import DTYPES, Cached, Noisy, Opaque, cached, half_precise, noisy
from tests.helpers import Gated, Plain, Stack, assert_exact, fuse, parallel_form, randomise, stack, tokens


@pytest.fixture(autouse=True)
def _clean(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, "fxfusion")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, compiler: str = "eager", **options: Any) -> Callable[..., Any]:
    given = {"form": "concatenated"} | options
    return torch.compile(
        model, backend=ffn_fusion, options={"compiler": compiler, "verify": "paranoid", "strict": True, **given}
    )


def compared(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.text.count("equals its parallel form")


def break_packs(factor: float = 1.5) -> None:
    """Packed weights that went stale, and nobody noticed."""
    for packed in _alive():
        for tensor in packed.tensors:
            tensor.mul_(factor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_calls_are_compared_and_no_others(caplog: pytest.LogCaptureFixture, dtype: torch.dtype) -> None:
    model = stack(Plain, half_precise(dtype), hidden=32, dtype=dtype)
    run = compiled(model, paranoid_calls=2)
    with torch.no_grad():
        results = [run(tokens(hidden=32, dtype=dtype)) for _ in range(3)]
        assert compared(caplog) == 2 and "call 2 of the graph of layers.0.ffn to layers.2.ffn equals" in caplog.text
        assert torch.equal(results[0], results[2])
        assert [row["part"] for row in last_reports()[-1].verifications] == ["group 0", "whole graph", "clean-up"]
        break_packs()
        run(tokens(hidden=32, dtype=dtype))
    assert compared(caplog) == 2, "the calls behind the first ones are not looked at"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_packed_weight_is_caught(dtype: torch.dtype) -> None:
    model, x = stack(Plain, half_precise(dtype), hidden=32, dtype=dtype), tokens(hidden=32, dtype=dtype)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        break_packs()
        with pytest.raises(VerificationError, match="call 2 of the graph of layers.0.ffn .*: output 0 differs"):
            run(x)


def test_a_weight_that_changed_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    model, x = stack(), tokens()
    run = compiled(model)
    with torch.no_grad():
        run(x)
        model.layers[1].ffn.down.weight.mul_(3)
        assert_exact(run(x), parallel_form(model, x), torch.float64)
    assert compared(caplog) == 2


def test_a_compiler_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxfusion.backend

    right = fxfusion.backend._compile

    def wrong(gm: Any, inputs: Any, settings: Any) -> Callable[..., Any]:
        return lambda *given: tuple(value * (1 + 1e-9) for value in right(gm, inputs, settings)(*given))

    monkeypatch.setattr(fxfusion.backend, "_compile", wrong)
    with pytest.raises(VerificationError, match=r"call 1 .* output 0 differs .* 1e-09, allowed 1e-10"):
        compiled(stack())(tokens())


def test_written_inputs_are_compared_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxfusion.backend

    model, x, cache = cached()
    other, same_cache = randomise(Cached()), cache.clone()
    with torch.no_grad():
        compiled(model)(x, cache)
        other(x, same_cache)
    assert torch.equal(cache, same_cache) and torch.equal(model.cache, other.cache) and cache.any()
    right = fxfusion.backend._compile

    def lose_a_write(gm: Any, inputs: Any, settings: Any) -> Callable[..., Any]:
        place = next(n for n, value in enumerate(inputs) if value is cache)
        return lambda *given: right(gm, inputs, settings)(*given[:place], given[place].clone(), *given[place + 1 :])

    torch._dynamo.reset()
    monkeypatch.setattr(fxfusion.backend, "_compile", lose_a_write)
    with torch.no_grad(), pytest.raises(VerificationError, match="call 1 .* which is written, differs"):
        compiled(model)(x, cache.zero_())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_random_numbers_are_those_of_the_call(caplog: pytest.LogCaptureFixture, compiler: str) -> None:
    model, x, ids = noisy()
    torch.manual_seed(3)
    with torch.no_grad():
        plain = torch.compile(model, backend=ffn_fusion, options={"compiler": compiler})(x, ids)
        torch._dynamo.reset()
        torch.manual_seed(3)
        assert torch.equal(compiled(model, compiler)(x, ids), plain) and compared(caplog) == 1


@pytest.mark.parametrize("falls_back", [False, True])
def test_inductor(caplog: pytest.LogCaptureFixture, falls_back: bool) -> None:
    model, x, ids = noisy()
    with torch.no_grad():
        compiled(model, "inductor", inductor={"fallback_random": falls_back})(x, ids)
    assert compared(caplog) == falls_back
    noted = any("noise draws random numbers" in note for note in last_reports()[-1].notes)
    assert noted is not falls_back and ("calls are not compared" in caplog.text) is not falls_back
    assert isinstance(model, Noisy)


def test_what_is_not_understood_is_never_run_twice(caplog: pytest.LogCaptureFixture) -> None:
    model = randomise(Opaque())
    with torch.no_grad():
        compiled(model)(tokens())
    assert float(model.log) == 2.0, "each of the two operations ran once"
    assert compared(caplog) == 0 and "calls are not compared, because fxverify.scaled" in caplog.text
    assert "might do anything twice" in last_reports()[-1].notes[-1]


def test_gradients_flow_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    model, x = stack(), tokens()
    compiled(model, form="auto")(x).square().sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    parallel_form(model, x).square().sum().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        assert_exact(gradient, parameter.grad, torch.float64, gradient=True)
    assert compared(caplog) == 1


def test_autocast_is_that_of_the_call(caplog: pytest.LogCaptureFixture) -> None:
    model, x = stack(hidden=32).float(), tokens(hidden=32, dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(x)
        assert compared(caplog) == 1
        break_packs()
        with pytest.raises(VerificationError, match="call 2"):
            run(x)


def test_prepacked_weights_and_dynamic_shapes(caplog: pytest.LogCaptureFixture) -> None:
    model = stack(hidden=32).float()
    run = torch.compile(
        model,
        backend=ffn_fusion,
        options={"compiler": "eager", "verify": "paranoid", "strict": True, "form": "prepacked"},
        dynamic=True,
    )
    with torch.no_grad():
        for seq in (5, 6, 7):
            run(tokens(seq=seq, hidden=32, dtype=torch.float32))
    assert compared(caplog) == 3


def test_views_of_one_memory_stay_views(caplog: pytest.LogCaptureFixture) -> None:
    class Shared(Stack):
        def forward(self, x: Tensor, whole: Tensor, part: Tensor) -> Tensor:
            part.add_(1)
            return super().forward(x + whole)

    model, whole = randomise(Shared(stack(Gated).layers)), torch.zeros(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        compiled(model)(tokens(), whole, whole[:1])
    assert compared(caplog) == 1 and whole[0].eq(1).all() and whole[1].eq(0).all()


def test_where_nothing_is_fused_nothing_is_added() -> None:
    seen = []

    def spy(self: ParanoidCallable, *args: Any, **kwargs: Any) -> None:
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParanoidCallable, "__init__", spy)
        compiled(nn.Linear(8, 8))(torch.randn(2, 8))
    assert not seen


def test_fuse_graph_has_no_calls_to_look_at() -> None:
    with pytest.raises(OptionError, match="fuse_graph returns a graph.*'numeric'"):
        fuse(stack(), tokens(), verify="paranoid")
    assert fxfusion.ffn_fusion is ffn_fusion
