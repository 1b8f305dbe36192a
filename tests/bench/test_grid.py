"""The grid of cells, the limit that they are held against, and which forms are compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.grid import (
    SHAPES,
    SMALL,
    Cell,
    Chain,
    Concatenated,
    Limits,
    decoder,
    first_calls,
    grid,
    measure_limits,
    pairs,
    shares,
)
from bench.record import Measurement


def test_shapes_are_those_of_the_published_models() -> None:
    assert (SHAPES["70B / 8"].hidden, SHAPES["70B / 8"].widths) == (8192, (3584,))
    assert (SHAPES["405B / 8"].hidden, SHAPES["405B / 8"].widths) == (16384, (6656,))
    run = SHAPES["Super-49B, run"].widths
    assert len(run) == 18 and run[:4] == (7168, 5632, 5632, 7168) and run[-3:] == (5632, 2816, 2816)


def test_the_grid_holds_each_cell_once() -> None:
    cells = list(grid())
    assert len(cells) == len(set(cells)) == 4 * len(SHAPES) * 6 * 2
    assert {(cell.length, cell.tokens, cell.dtype) for cell in cells[: len(SHAPES)]} == {(8, 1, torch.bfloat16)}


def test_the_limit_is_the_longer_of_reading_and_computing() -> None:
    limits = Limits(bandwidth=1e9, rate={torch.bfloat16: 1e12})
    assert limits.seconds(10**6, 1, torch.bfloat16) == pytest.approx(2e-3)
    assert limits.seconds(10**6, 10_000, torch.bfloat16) == pytest.approx(2e-2)
    cell = Cell(SMALL["small, unequal"], 3, 1, torch.bfloat16)
    assert cell.parameters == 3 * 64 * (96 + 64 + 96)


def test_limits_are_of_a_real_machine() -> None:
    found = measure_limits("cpu", small=True)
    assert 1e8 < found.bandwidth < 1e12 and all(1e8 < rate < 1e14 for rate in found.rate.values())


def test_each_form_is_compared_with_the_fused_one_of_its_mode() -> None:
    names = ["eager", "unfused", "fused", "surgery", "unfused, max-autotune", "fused, max-autotune"]
    found = pairs([*names, "unfused again, max-autotune"], "unfused again, max-autotune")
    assert found == [
        ("eager", "fused"),
        ("unfused", "fused"),
        ("surgery", "fused"),
        ("unfused, max-autotune", "fused, max-autotune"),
        ("unfused, max-autotune", "unfused again, max-autotune"),
    ]


def test_a_share_of_one_is_the_limit_itself() -> None:
    found = Measurement.of({}, {"fused": [0.02, 0.02], "eager": [0.04, 0.04]})
    assert shares(found, 0.02) == {"share of limit, fused": 1.0, "share of limit, eager": 0.5}


def test_a_form_that_computes_something_else_is_not_timed() -> None:
    chain = Chain(decoder(64, [96, 64], torch.float32, "cpu").model.layers)
    x = torch.randn(3, 64)
    with torch.no_grad():
        _, errors = first_calls({"eager": chain, "concatenated": Concatenated(chain)}, chain, x)
        assert max(errors.values()) < 1e-5
        with pytest.raises(RuntimeError, match="fused is off by"):
            first_calls({"fused": chain}, chain, x)  # members in a row are not the parallel form
        with pytest.raises(RuntimeError, match="unfused is off by"):
            first_calls({"unfused": nn.Identity()}, chain, x)
