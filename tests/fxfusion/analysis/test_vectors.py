from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfusion.analysis.vectors import Directions, cosine_distance, pick, sums_by_sequence
from fxfusion.errors import CaptureError

ALL = torch.ones(2, 3, dtype=torch.bool)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(one: Tensor, other: Tensor) -> Tensor:
    return cosine_distance(Directions.of(one), Directions.of(other))


def test_the_distance_is_one_minus_the_cosine() -> None:
    one, other = random(50, 8), random(50, 8, seed=1)
    expected = 1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)
    torch.testing.assert_close(distance(one, other), expected)
    torch.testing.assert_close(distance(one, -3 * one), torch.full((50,), 2.0, dtype=torch.float64))
    assert float(distance(one, 5 * one).abs().max()) < 1e-15


def test_small_distances_keep_their_digits_in_float32() -> None:
    one = random(200, 64)
    other = one + 1e-4 * random(200, 64, seed=1)
    exact = distance(one, other)
    single = distance(one.float(), other.float()).double()
    assert float(((single - exact) / exact).abs().max()) < 1e-2
    naive = (1 - torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)).double()
    assert float(((naive - exact) / exact).abs().max()) > 1


def test_zero_vectors_are_equal_to_each_other_and_far_from_all_else() -> None:
    vectors = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    others = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    assert distance(vectors, others).tolist() == [0.0, 1.0, 1.0]


def test_values_that_are_not_finite_stay_so() -> None:
    vectors = torch.tensor([[1.0, float("nan")], [1.0, float("inf")]])
    assert distance(vectors, torch.ones(2, 2)).isnan().all()


def test_tokens_are_picked_from_both_shapes_of_a_stream() -> None:
    stream = random(2, 3, 4)
    seen = torch.tensor([[True, False, True], [False, True, True]])
    expected = torch.stack([stream[0, 0], stream[0, 2], stream[1, 1], stream[1, 2]])
    assert torch.equal(pick(stream, seen), expected)
    assert torch.equal(pick(stream.reshape(6, 4), seen), expected)
    assert torch.equal(pick(stream, ALL), stream.reshape(6, 4))
    with pytest.raises(CaptureError, match=r"stream is \[3, 2, 4\], not \[batch, seq, hidden\]"):
        pick(stream.transpose(0, 1), seen)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_picked_values_are_wide(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert pick(random(2, 3, 4).to(dtype), ALL).dtype is wide


def test_sums_go_to_their_sequence() -> None:
    seen = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    found = sums_by_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0]), seen)
    assert found.tolist() == [3.0, 0.0, 12.0] and found.dtype is torch.float64
