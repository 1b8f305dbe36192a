"""Sums and solutions, against the least-squares solver of torch on the stacked problem; and the memory they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfusion.errors import OptionError
from fxfusion.recovery import gram
from fxfusion.recovery.gram import GramSums, bytes_needed, free_memory, limit_or_half, parts_of

WIDTH, HIDDEN, TOKENS = 7, 3, 50


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(TOKENS, size, generator=generator, dtype=dtype) for size in (WIDTH, HIDDEN))


def summed(inputs: Tensor, lacking: Tensor, bias: bool = False) -> GramSums:
    sums = GramSums(inputs.shape[1], lacking.shape[1], inputs.device, bias)
    for part in range(0, TOKENS, 20):
        sums.add(inputs[part : part + 20], lacking[part : part + 20])
    return sums


def ridge(inputs: Tensor, lacking: Tensor, penalty: Tensor, moved: Tensor | None = None) -> Tensor:
    """argmin |h x - r|^2 + |sqrt(penalty) (moved + x)|^2, by stacking."""
    root = penalty.sqrt().diag()
    below = torch.zeros(inputs.shape[1], lacking.shape[1]).double() if moved is None else -root @ moved.t()
    return torch.linalg.lstsq(torch.cat([inputs, root]), torch.cat([lacking, below])).solution.t()


@pytest.mark.parametrize("rows", [1024, 3])
def test_solution_is_that_of_stacked_least_squares(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "ROWS", rows)
    inputs, lacking = problem()
    sums = summed(inputs, lacking)
    assert sums.tokens == TOKENS
    penalty = torch.full((WIDTH,), 0.1 * sums.scale, dtype=torch.float64)
    found = sums.solve(0.1)
    assert found is not None
    torch.testing.assert_close(found, ridge(inputs, lacking, penalty), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, ridge(inputs, lacking, 2 * penalty), rtol=1e-3)
    again = sums.solve(0.1)  # the sums are as they were
    assert again is not None and torch.equal(found, again)


def test_the_penalty_pulls_to_where_the_weights_started() -> None:
    inputs, lacking = problem()
    moved = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(5)).double()
    sums = summed(inputs, lacking)
    penalty = torch.full((WIDTH,), 0.5 * sums.scale, dtype=torch.float64)
    found = sums.solve(0.5, moved)
    assert found is not None
    torch.testing.assert_close(found, ridge(inputs, lacking, penalty, moved), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, ridge(inputs, lacking, penalty), rtol=1e-3)


def test_a_bias_is_not_penalised_by_the_size_of_other_channels() -> None:
    inputs, lacking = problem()
    wide = torch.cat([inputs * 1000, torch.ones(TOKENS, 1).double()], dim=1)
    sums = summed(wide, lacking + 5.0, bias=True)
    found = sums.solve(1e-4)
    assert found is not None
    assert (found[:, -1] - 5.0).abs().max() < 0.6
    unaware = summed(wide, lacking + 5.0).solve(1e-4)
    assert unaware is not None and (unaware[:, -1] - 5.0).abs().max() > 3.0


def test_singular_sums_have_a_solution_by_their_penalty_and_zeros_have_none() -> None:
    inputs, lacking = problem()
    inputs[:, 3] = inputs[:, 2]
    found = summed(inputs, lacking).solve(1e-3)
    assert found is not None and bool(found.isfinite().all())
    assert summed(torch.zeros_like(inputs), lacking).solve(1e-3) is None


def test_float32_products_are_summed_in_float64() -> None:
    inputs, lacking = problem(dtype=torch.float32)
    sums = summed(inputs, lacking)
    assert sums.gram.dtype == sums.cross.dtype == torch.float64
    assert sums.is_finite
    lacking[0, 0] = float("nan")
    assert not summed(inputs, lacking).is_finite


def test_the_formula_counts_what_is_held() -> None:
    assert bytes_needed(8192, 4096, 5) == 24 * 8192**2 + 88 * 8192 * 4096 + 4 * 1024 * 8192


CPU = torch.device("cpu")


def test_half_of_what_is_free() -> None:
    free = free_memory(CPU)
    assert 2**20 < free < 2**50
    assert abs(limit_or_half(None, CPU) - free // 2) < free // 4
    assert limit_or_half(1000, CPU) == 1000


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "1G"])
def test_what_is_no_number_of_bytes_is_refused(given: object) -> None:
    with pytest.raises(OptionError, match="memory_limit: expected bytes"):
        limit_or_half(given, CPU)  # type: ignore[arg-type]


def test_a_container_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, now = tmp_path / "max", tmp_path / "current"
    most.write_text("3000\n")
    now.write_text("1000\n")
    monkeypatch.setattr(gram, "_GROUPS", ((most, now),))
    assert free_memory(CPU) == 2000
    most.write_text("max\n")
    assert free_memory(CPU) > 2000


def test_as_few_parts_as_fit() -> None:
    assert parts_of(100, 10, 5, bytes_needed(100, 10, 5), "it") == [slice(0, 100)]
    three = parts_of(100, 10, 5, bytes_needed(34, 10, 5), "it")
    assert three == [slice(0, 34), slice(34, 68), slice(68, 100)]


def test_what_cannot_fit_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="memory_limit: layer 4 takes at least"):
        parts_of(100, 10, 5, 1000, "layer 4")
