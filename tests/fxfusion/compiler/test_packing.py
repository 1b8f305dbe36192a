"""Packed weights: shared, fresh after every counted change, freed. Others writes: `test_freshness`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.compiler.packing import live_packs
from tests.helpers import Block, Plain, Rms, Stack, assert_exact, error_of, parallel_form, randomise, stack, tokens

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def compiled(model: nn.Module, compiler: str = "eager", **options: Any) -> Callable[..., Any]:
    """The model through the backend; `strict` so that no test passes by a fall back."""
    given = {"compiler": compiler, "strict": True, **options}
    return torch.compile(model, backend=fxfusion.ffn_fusion, options=given)


def biased(**kwargs: Any) -> Stack:
    """Blocks whose weights, biases, gains and shifts are all packed."""
    return stack(Plain, nn.LayerNorm, **kwargs)


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() * 1.3 + 0.05 for name, value in model.state_dict().items()}


def _copy(model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(other_state(model)[name])


def _load(model: nn.Module) -> None:
    model.load_state_dict(other_state(model))


def _assign(model: nn.Module) -> None:
    model.load_state_dict(other_state(model), assign=True)


def _data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.3


def _data_twice(model: nn.Module) -> None:
    """The second copy often lands where the first weights were: same address, same version."""
    for _ in range(2):
        _data(model)


def _mul(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)


def _one_bias(model: nn.Module) -> None:
    with torch.no_grad():
        model.layers[1].norm.bias.add_(0.5)


def _step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def _round_trip(model: nn.Module) -> None:
    """float64 -> bfloat16 -> float64 rounds every weight."""
    model.to(torch.bfloat16).to(torch.float64)


def _replace(model: nn.Module) -> None:
    model.layers[1].ffn.fc1.weight = nn.Parameter(model.layers[1].ffn.fc1.weight.detach() * 1.3)


CHANGES = [_copy, _load, _assign, _data, _data_twice, _mul, _one_bias, _step, _round_trip, _replace]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_change_is_seen_by_the_next_call(change: Callable[[nn.Module], None], grad: bool) -> None:
    model, x = biased(), tokens()
    with torch.set_grad_enabled(grad):
        run = compiled(model)
        before = run(x).detach()  # its autograd graph would keep the old weights alive
        for _ in range(3):
            change(model)
            after = run(x).detach()
            assert_exact(after, parallel_form(model, x), torch.float64)
            assert error_of(after, before) > 1e-4, "the change must be large enough to be seen"
    assert live_packs() == (0 if grad else 1), "while gradients are recorded nothing is packed"


def test_change_of_dtype_is_followed_there_and_back() -> None:
    model = biased()
    run = compiled(model)
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        x = tokens(dtype=dtype)
        with torch.no_grad():
            assert_exact(run(x), parallel_form(model, x), dtype)
    assert live_packs() == 1, "one pack, in the dtype that the weights have now"


def test_one_pack_for_all_graphs_of_a_model() -> None:
    model = biased()
    run = compiled(model)
    before = fxfusion.last_reports()  # the last 64 only, so that counting them says nothing
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        for seq in (3, 5, 7):  # one static graph, then one with a dynamic length
            x = tokens(seq=seq)
            with mode():
                assert_exact(run(x), parallel_form(model, x), torch.float64)
    new = [report for report in fxfusion.last_reports() if not any(report is old for old in before)]
    assert len(new) == 4, "graphs: one static, then one dynamic per mode"
    assert live_packs() == 1
    with torch.inference_mode():
        _load(model)
        assert_exact(run(x), parallel_form(model, x), torch.float64)
    out = run(x)
    assert_exact(out, parallel_form(model, x), torch.float64)
    out.sum().backward()  # on the members' own weights, whatever was packed in other modes


@pytest.mark.parametrize("model_dies", [True, False])
def test_packs_die_with_the_model_and_with_the_compiled_graph(model_dies: bool) -> None:
    held = [biased()]
    run = compiled(held[0])
    with torch.no_grad():
        run(tokens())
    assert live_packs() == 1
    del run
    held.clear() if model_dies else torch._dynamo.reset()
    gc.collect()
    assert live_packs() == 0 and bool(held) is not model_dies


@torch.no_grad()
def test_two_modules_share_one_graph_and_keep_their_own_packs() -> None:
    models, x = [biased(seed=1), biased(seed=2)], tokens()
    seen: list[Tensor] = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    run = torch.compile(forward, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})
    for _ in range(3):
        for model in models:
            seen.append(run(model, x))
            assert_exact(seen[-1], parallel_form(model, x), torch.float64)
    assert error_of(seen[0], seen[1]) > 1e-2
    assert live_packs() == 2
    addresses = [_pack_addresses() for model in models for _ in [run(model, x)]]
    assert addresses[0] == addresses[1], "alternating must not pack again"


def _pack_addresses() -> set[int]:
    from fxfusion.compiler.packing import _registry

    return {tensor.data_ptr() for packed in _registry.values() for tensor in packed.tensors}


@torch.no_grad()
def test_packing_ignores_ambient_autocast() -> None:
    model, x = biased(dtype=torch.float32), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused, parallel = run(x), parallel_form(model, x)
    model.double()
    truth = parallel_form(model, x.double())
    assert_half_like(fused, parallel, truth)
    model.float()
    assert_exact(run(x), parallel_form(model, x), torch.float32)


def assert_half_like(fused: Tensor, parallel: Tensor, truth: Tensor) -> None:
    """The rule for half precision, on values that autocast computed in half precision."""

    def rmse(value: Tensor) -> float:
        return float((value.detach().double() - truth.detach()).pow(2).mean().sqrt())

    assert rmse(fused) <= 2 * rmse(parallel)


def test_frozen_blocks_under_a_shared_parameter_group() -> None:
    """Weights that need no gradient get none."""
    model = Stack([Block(Rms(8), Plain(8, 12)) for _ in range(3)])
    randomise(model)
    for parameter in model.layers[1].parameters():
        parameter.requires_grad_(False)
    x = tokens()
    compiled(model)(x).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parallel_form(model, x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_exact(got[name], parameter.grad, torch.float64, gradient=True)
        else:
            assert got[name] is None
