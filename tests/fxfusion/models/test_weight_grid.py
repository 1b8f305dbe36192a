"""Grids: what is on one stays, GGUF's Q4_0 is one, and error feedback is that of GPTQ in its own form."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from fxfusion.errors import OptionError
from fxfusion.models.weight_grid import WeightGrid

ROWS, WIDTH = 24, 96
GRIDS = ["int4:16", "int4:32", "int8:32"]


def weights(seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) / 10


def factor(seed: int = 1) -> Tensor:
    """Of the Gram matrix of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator).double() + 2
    inputs = torch.randn(500, WIDTH, generator=generator).double() @ mixed
    gram = inputs.t() @ inputs
    return torch.linalg.cholesky(gram + 0.01 * gram.diagonal().mean() * torch.eye(WIDTH))


def cost(wanted: Tensor, found: Tensor, lower: Tensor) -> float:
    return float(((wanted.double() - found.double()) @ lower).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", GRIDS)
def test_what_is_on_the_grid_stays(text: str, dtype: torch.dtype) -> None:
    grid = WeightGrid.parse(text)
    for found in (grid.nearest(weights().to(dtype)), grid.fed_back(weights(), factor()).to(dtype)):
        assert torch.equal(grid.nearest(found), found)
        assert found.unflatten(1, (-1, grid.group))[0, 0].unique().numel() <= 2**grid.bits
        moved = found.clone()
        moved[0, 0] += found[0, : grid.group].abs().max() / 2**grid.bits
        assert not torch.equal(grid.nearest(moved), moved), "a value beside the grid was not noticed"


@pytest.mark.parametrize("text", GRIDS)
def test_the_nearest_is_off_by_half_a_step(text: str) -> None:
    grid = WeightGrid.parse(text)
    integers, scales = grid.quantised(weights())
    assert integers.dtype == torch.int8 and scales.shape == (ROWS, WIDTH // grid.group)
    step = scales.abs().repeat_interleave(grid.group, 1)
    off = (grid.nearest(weights()) - weights()).abs()
    inside = integers < 2 ** (grid.bits - 1) - 1  # that end is a step less far than the other
    assert (off <= 0.6 * step)[inside].all() and (off > 0.4 * step).any() and (off <= 1.5 * step).all()


def test_four_bits_in_groups_of_32_are_q4_0() -> None:
    kind = gguf.GGMLQuantizationType.Q4_0

    def stored(values: Tensor) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))

    for found in (WeightGrid(4, 32).nearest(weights()), WeightGrid(4, 32).fed_back(weights(), factor()).float()):
        assert torch.equal(stored(found), found)
    other = WeightGrid(4, 16).nearest(weights())
    assert not torch.equal(stored(other), other)


def gptq(weight: Tensor, lower: Tensor, scales: Tensor, bits: int) -> Tensor:
    """arXiv 2210.17323, algorithm 1, by columns: the factor of the inverse Hessian, errors to the columns behind."""
    inverse = torch.cholesky_inverse(lower)
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    half = 2 ** (bits - 1)
    for column in range(weight.shape[1]):
        found[:, column] = (left[:, column] / scales).round().clamp(-half, half - 1) * scales
        error = (left[:, column] - found[:, column]) / upper[column, column]
        left[:, column:] -= torch.outer(error, upper[column, column:])
    return found


def test_it_is_gptq_from_the_last_column_to_the_first() -> None:
    """One group, so its scales are those of the weights; rows whose largest value is rounded so by itself."""
    grid, lower = WeightGrid(8, WIDTH), factor()
    gram = (lower @ lower.t()).flip(0, 1)
    scales = grid.quantised(weights())[1][:, 0].double()
    wanted = gptq(weights().flip(1), torch.linalg.cholesky(gram), scales, 8).flip(1)
    found = grid.fed_back(weights(), lower)
    largest = weights().abs().argmax(1, keepdim=True)
    same = (wanted.gather(1, largest) == found.gather(1, largest)).squeeze(1)
    assert same.sum() >= 2 and not same.all()
    torch.testing.assert_close(found[same], wanted[same])
    other = gptq(weights(), lower, scales, 8)
    assert (other[same] - found[same]).abs().max() > 0.5 * scales.abs().min(), "the order was not noticed"


@pytest.mark.parametrize("text", GRIDS)
def test_feedback_costs_less_than_the_nearest_values(text: str) -> None:
    grid, lower = WeightGrid.parse(text), factor()
    nearest, found = grid.nearest(weights()), grid.fed_back(weights(), lower)
    assert cost(weights(), found, lower) < 0.5 * cost(weights(), nearest, lower)
    assert cost(weights(), grid.fed_back(weights(), torch.eye(WIDTH).double()), lower) > cost(weights(), found, lower)
    assert torch.equal(grid.fed_back(weights(), torch.eye(WIDTH).double()).float(), nearest)


def test_zeros() -> None:
    values = weights()
    values[0, -16:], values[1, -16:] = 0, 1e-9  # what the scale does not hold; rounded first
    for found in (WeightGrid(4, 16).nearest(values), WeightGrid(4, 16).fed_back(values, factor())):
        assert not found[0:2, -16:].any() and found.isfinite().all() and found[0, :-16].any()


@pytest.mark.parametrize("text", ["int4", "int4:0", "int3:32", "q4_0", "int4:32:1", "", None])
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(OptionError, match="--grid: expected int4:GROUP or int8:GROUP, such as int4:32, got"):
        WeightGrid.parse(text, "--grid")


def test_what_has_no_place_on_a_grid() -> None:
    grid = WeightGrid.parse(" int4:32 ")
    assert str(grid) == "int4:32"
    grid.check("down", 64)
    with pytest.raises(OptionError, match="int4:32: down has 48 inputs, which are no whole groups of 32"):
        grid.check("down", 48)
    with pytest.raises(OptionError, match=r"down is torch.int8, and only floating-point weights"):
        grid.check("down", 64, torch.int8)
    with pytest.raises(ValueError, match="finite"):
        grid.nearest(weights().fill_(float("nan")))
