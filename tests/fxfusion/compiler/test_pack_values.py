"""Packed weights are those of the graph, computed with one member's weight more than they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxfusion.compiler.pack_values import own, packed_values

ROWS, COLUMNS = 8, 4


def folded(weights: list[Tensor], gains: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    flat = [gain.reshape(-1) for gain in gains]
    wide = torch.cat([weight * gain for weight, gain in zip(weights, flat, strict=True)], 0)
    return wide, torch.cat(weights, dim=1), flat[0]


def graph_of(call: Callable[..., Any], sources: list[Tensor]) -> fx.GraphModule:
    """Each node with its example, as packs have them."""

    class Whole(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor, g: Tensor, h: Tensor, i: Tensor) -> Any:
            return call([a, b, c], [g, h, i])

    module = fx.symbolic_trace(Whole())

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            n.meta["example_value"] = found.to("meta") if isinstance(found, Tensor) else found
            return found

    Noting(module).run(*sources)
    return module


@pytest.fixture
def sources() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(3)]
    return [*weights, *(torch.randn(1, COLUMNS, generator=generator) for _ in range(3))]


def test_values_are_those_of_the_graph_bit_for_bit(sources: list[Tensor]) -> None:
    module = graph_of(folded, sources)
    found, wanted = list(packed_values(module, sources)), module(*sources)
    assert len(found) == len(wanted) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    sources[4].mul_(2)
    again = list(packed_values(module, sources))
    assert torch.equal(again[0], module(*sources)[0]) and not torch.equal(again[0], wanted[0])


def test_weights_of_another_dtype_give_values_of_it(sources: list[Tensor]) -> None:
    """A model that was moved keeps its packs."""
    module = graph_of(folded, sources)
    half = [source.to(torch.bfloat16) for source in sources]
    for one, other in zip(packed_values(module, half), module(*half), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other)


def test_dtypes_are_promoted_as_the_graph_does_it(sources: list[Tensor]) -> None:
    sources[1] = sources[1].double()
    module = graph_of(folded, sources)
    for one, other in zip(packed_values(module, sources), module(*sources), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


class Alive(TorchDispatchMode):
    """The most products of a member's weight that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._there = 0, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor:
            self._there.append(weakref.ref(found.untyped_storage()))
            self.most = max(self.most, sum(each() is not None for each in self._there))
        return found


def test_one_product_is_there_at_once(sources: list[Tensor]) -> None:
    module = graph_of(folded, sources)
    with Alive() as lazily:
        list(packed_values(module, sources))
    with Alive() as eagerly:
        module(*sources)
    assert lazily.most == 1 and eagerly.most == 3


def test_values_that_are_weights_get_memory_of_their_own(sources: list[Tensor]) -> None:
    module = graph_of(lambda weights, gains: (weights[0], weights[1].t(), gains[0] + 0), sources)
    same, turned, new = packed_values(module, sources)
    assert own(same, sources).data_ptr() != sources[0].data_ptr()
    assert own(turned, sources).is_contiguous() and torch.equal(own(turned, sources), sources[1].t())
    assert own(new, sources) is not new and own(new, sources).data_ptr() == new.data_ptr()
