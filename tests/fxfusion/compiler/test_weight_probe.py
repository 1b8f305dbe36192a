"""weight_probe: which elements are read, in any layout, and what must not be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfusion.compiler.weight_probe import PLACES, DeviceProbe, MemoryProbe, _offsets, _places

LAYOUTS = {
    "plain": lambda: torch.randn(24, 40),
    "transposed": lambda: torch.randn(24, 40).T,
    "view in a larger storage": lambda: torch.randn(90, 40)[7:80:3, 1:33],
    "expanded": lambda: torch.randn(1, 40).expand(24, 40),
    "odd address": lambda: torch.randn(24 * 40 + 1, dtype=torch.bfloat16)[1:].view(24, 40),
    "gain": lambda: torch.randn(16),
    "number": lambda: torch.tensor(2.0),
    "complex": lambda: torch.randn(24, 40, dtype=torch.complex64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_seen_to_change_and_to_stay(layout: str) -> None:
    weight = LAYOUTS[layout]()
    memory, device = MemoryProbe([weight]), DeviceProbe([weight])
    assert memory.same() and device.same([weight])
    assert device.was_same([weight]) and device.was_same([weight])
    weight.data.copy_(weight.clone() * 2 + 1) if layout != "expanded" else weight[:1].mul_(2)
    assert not memory.same() and not device.same([weight])
    assert device.was_same([weight]) and not device.was_same([weight]), "an answer comes one call later"


def test_nan_is_equal_to_itself() -> None:
    weight = torch.full((24, 40), float("nan"))
    assert MemoryProbe([weight]).same() and DeviceProbe([weight]).same([weight])


def test_weights_without_elements() -> None:
    weight = torch.empty(0, 40)
    assert MemoryProbe([weight]).same() and MemoryProbe([]).same() and DeviceProbe([weight]).same([weight])


def test_places_of_large_weights_are_spread_over_every_axis() -> None:
    shape = torch.Size([1 << 20, 1 << 13])  # 2**33 elements
    places = list(_places(shape))
    assert len(places) == PLACES
    for axis, length in enumerate(shape):
        assert sorted(place[axis] * PLACES // length for place in places) == list(range(PLACES))
    assert max(_offsets(shape, (1 << 13, 1), 4)) > 1 << 33


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("start", range(0, 75, 5))
def test_a_quarter_of_the_rows_or_columns_is_always_seen(axis: int, start: int) -> None:
    weight: Tensor = torch.zeros(100, 100)
    probe = MemoryProbe([weight])
    weight.narrow(axis, start, 25).fill_(1)
    assert not probe.same()


def test_a_probe_keeps_no_storage_alive() -> None:
    from fxfusion.graph.torch_private import StorageWatch

    weight = torch.randn(24, 40)
    watch, probes = StorageWatch([weight]), (MemoryProbe([weight]), DeviceProbe([weight]))
    del weight
    assert watch.any_expired() and probes
