"""What the backend must leave alone, and says why: results stay those of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion import RefusalCode, ffn_fusion, last_reports
from fxfusion.errors import NotFusedError
from tests.helpers import Plain, Stack, assert_exact, parallel_form, refusal_with, stack, tokens

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def compiled(model: Callable[..., Any], compiler: str = "eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=ffn_fusion, options={"compiler": compiler, **options})


class Odd(Tensor):
    """A trivial tensor subclass."""


def test_tensor_subclass_weights_are_refused() -> None:
    model, x = stack(), tokens()
    weight = model.layers[1].ffn.down.weight
    model.layers[1].ffn.down.weight = nn.Parameter(weight.detach().as_subclass(Odd))
    result = compiled(model, strict=True)(x)
    assert torch.equal(result.as_subclass(Tensor), model(x).as_subclass(Tensor))
    report = last_reports()[-1]
    assert not report.groups
    refusal_with(report.refusals, RefusalCode.TENSOR_SUBCLASS, "Odd")


class Loop(nn.Module):
    """Blocks in a given order, some more than once."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.order = stack(), tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.inner.layers[index](x)
        return x


def test_weights_used_twice_never_meet_in_one_group() -> None:
    model, x = Loop((0, 1, 0, 2)), tokens()
    result = compiled(model, strict=True)(x)
    assert [len(group.members) for group in last_reports()[-1].groups] == [2, 2]
    wanted = x
    for pair in ((0, 1), (0, 2)):  # each group has its own packed copy
        wanted = wanted + sum(model.inner.layers[i](wanted) - wanted for i in pair)
    assert_exact(result, wanted, torch.float64)


def test_one_weight_in_two_neighbours_is_refused() -> None:
    model, x = Loop((0, 0)), tokens()
    assert torch.equal(compiled(model, strict=True)(x), model(x))
    refusal_with(last_reports()[-1].refusals, RefusalCode.SHARED_WEIGHT)


def test_dropout_in_training_mode_is_refused() -> None:
    class Dropped(Plain):
        def forward(self, n: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(n), 0.5, self.training)

    model, x = stack(Dropped).train(), tokens()
    torch.manual_seed(0)
    wanted = model(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(model)(x), wanted)
    refusal_with(last_reports()[-1].refusals, RefusalCode.RANDOM)
    model.eval()
    assert_exact(compiled(model, strict=True)(x), parallel_form(model, x), torch.float64)


class Tapped(Stack):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(seen[-1]))
        return tuple(seen)


def test_hidden_states_as_outputs_are_refused() -> None:
    model, x = Tapped(stack().layers), tokens()
    wanted, got = model(x), compiled(model)(x)
    assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))
    refusal_with(last_reports()[-1].refusals, RefusalCode.STREAM_READ)


def test_activation_checkpointing_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = stack(), tokens()

    def forward(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    result = compiled(forward, "aot_eager")(x)
    assert_exact(result, model(x), torch.float64)
    refusal_with(last_reports()[-1].refusals, RefusalCode.HIGHER_ORDER)


def test_weights_baked_into_the_graph_are_not_packed() -> None:
    """With `prepare_freezing` Dynamo hands over weights as constants; packed they would go stale."""
    model, x = stack(), tokens()
    with torch._dynamo.config.patch(prepare_freezing=True), torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
        torch._dynamo.reset()
        with pytest.raises(NotFusedError, match="baked into the graph"):
            compiled(model, strict=True)(x)


def test_wrapper_subclasses_are_refused() -> None:
    """As quantisation libraries build them: a subclass that holds other tensors."""
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    model, x = stack(), tokens()
    weight = model.layers[1].ffn.up.weight.detach()
    model.layers[1].ffn.up.weight = nn.Parameter(two.TwoTensor(weight, weight.clone()), requires_grad=False)
    with torch.no_grad():
        wanted = model(x)
        got = compiled(model, "aot_eager", strict=True)(x)
    assert_exact(got.a if isinstance(got, two.TwoTensor) else got, getattr(wanted, "a", wanted), torch.float64)
    refusal_with(last_reports()[-1].refusals, RefusalCode.TENSOR_SUBCLASS, "TwoTensor")
    assert not last_reports()[-1].groups


def test_dtensor_weights_are_refused() -> None:
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs torch.distributed without a process group")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        model = stack()
        x = distribute_tensor(tokens(), mesh, [Replicate()])
        distribute_module(model, mesh)
        with torch.no_grad():
            got, wanted = compiled(model, "aot_eager", strict=True)(x), model(x)
        assert_exact(got.to_local(), wanted.to_local(), torch.float64)
        assert not last_reports()[-1].groups
        refusal_with(last_reports()[-1].refusals, RefusalCode.TENSOR_SUBCLASS, "DTensor")
    finally:
        distributed.destroy_process_group()
