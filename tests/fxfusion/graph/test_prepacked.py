"""Packed linear operators: right, alive as long as they are read, and clear where they cannot be."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.nn.functional as F

from fxfusion.graph import prepacked
from fxfusion.graph.torch_private import onednn_packs

pack, linear = torch.ops.fxfusion.pack_weight, torch.ops.fxfusion.packed_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (70, 33), (3, 5)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_packed_linear_layer_is_a_linear_layer(dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> None:
    assert onednn_packs(dtype), "the tests run on x86, where oneDNN packs both"
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = pack(weight, tokens)
    assert packed.shape == weight.shape and packed.dtype == dtype and prepacked.is_packed(packed)
    for x in (torch.randn(1, shape[1]), torch.randn(2, 7, shape[1]), torch.randn(0, shape[1])):
        for added in (None, bias):
            result = linear(x.to(dtype), packed, added)
            exact = F.linear(x.to(dtype).double(), weight.double(), None if added is None else added.double())
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)
    if shape[1] > 4:
        other = linear(x.new_ones(1, shape[1]).to(dtype), pack(weight.flip(0), tokens), None)
        assert not torch.allclose(other, F.linear(x.new_ones(1, shape[1]).to(dtype), weight))


def test_other_tensors_are_refused() -> None:
    weight = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="no packed weight"):
        linear(torch.randn(1, 4), weight, None)
    assert not prepacked.is_packed(weight)


def test_memory_lives_as_long_as_what_shows_it() -> None:
    before = len(prepacked._by_address)
    packed = pack(torch.randn(64, 64), 16)
    view = packed[:1]
    del packed
    gc.collect()
    assert len(prepacked._by_address) == before + 1
    del view
    gc.collect()
    assert len(prepacked._by_address) == before


def test_fake_tensors_pass_through() -> None:
    shown = linear(torch.empty(2, 3, 8, device="meta"), pack(torch.empty(4, 8, device="meta"), 1), None)
    assert shown.shape == (2, 3, 4)


def test_huge_pages_are_asked_for_where_they_fit() -> None:
    small = torch.zeros(16)
    assert not prepacked.use_huge_pages(small.data_ptr(), 64), "smaller than a page"
    large = torch.arange(2 << 20, dtype=torch.float32)  # 8 MiB
    moved = prepacked.use_huge_pages(large.data_ptr(), large.numel() * 4)
    assert moved in (True, False) and (sys.platform.startswith("linux") or not moved)
    assert large[-1] == (2 << 20) - 1
