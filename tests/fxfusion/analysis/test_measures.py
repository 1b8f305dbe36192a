from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxfusion.analysis import measures
from fxfusion.analysis.measures import (
    LOSS_ONLY,
    WITH_REFERENCE,
    Directions,
    cosine_distance,
    pick,
    sums_by_sequence,
    token_measures,
)
from fxfusion.errors import CaptureError

VOCABULARY = 8


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def measure(ours: list[float], theirs: list[float], target: int = 0, dtype: torch.dtype = torch.float32) -> list[float]:
    """The five measures of one token."""
    rows = [torch.tensor(row, dtype=dtype)[None, None] for row in (ours, theirs)]
    found = token_measures(rows[0], torch.tensor([[target]]), torch.ones(1, 1, dtype=torch.bool), rows[1])
    assert found.shape == (1, len(WITH_REFERENCE))
    return found[0].tolist()


def test_values_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 log 2 + 1/4 log 1/2 = 1/4 log 2."""
    ours, theirs = [0.0, 0.0, math.log(2)], [math.log(2), 0.0, 0.0]
    loss, increase, kl, top1, top5 = measure(ours, theirs, target=0)
    assert loss == pytest.approx(math.log(4))
    assert increase == pytest.approx(math.log(2))
    assert kl == pytest.approx(0.25 * math.log(2))
    assert (top1, top5) == (0.0, 1.0)
    assert measure(ours, theirs, target=2)[1] == pytest.approx(-math.log(2))


def test_the_divergence_is_from_the_reference() -> None:
    """KL is not symmetric: KL(p || q) with p the reference."""
    p, q = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    found = measure([math.log(b) for b in q], [math.log(a) for a in p])[2]
    assert found == pytest.approx(expected, rel=1e-6) and found != pytest.approx(reverse, rel=0.1)


@pytest.mark.parametrize(("rank", "inside"), [(0, 1.0), (3, 1.0), (4, 1.0), (5, 0.0), (7, 0.0)])
def test_top5_asks_for_the_rank_of_the_references_best_in_the_model(rank: int, inside: float) -> None:
    ours = [float(-v) for v in range(VOCABULARY)]  # token v has rank v
    theirs = [0.0] * VOCABULARY
    theirs[rank] = 1.0
    assert measure(ours, theirs)[3:] == [float(rank == 0), inside]


def test_ties_count_for_the_lowest_id_and_at_the_fifth_place_for_both() -> None:
    assert measure([1.0, 1.0, 0.0], [0.0, 1.0, 0.0])[3] == 0.0
    assert measure([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])[3] == 1.0
    ours = [6.0, 5.0, 4.0, 3.0, 1.0, 1.0, 0.0]
    assert [measure(ours, [float(v == best) for v in range(7)])[4] for best in (4, 5, 6)] == [1.0, 1.0, 0.0]


def test_a_vocabulary_of_less_than_five() -> None:
    assert measure([0.0, 1.0], [1.0, 0.0])[3:] == [0.0, 1.0]


def test_equal_logits_are_at_exactly_no_distance() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = (logits(5, 40, 1000) * 4).to(dtype)
        found = token_measures(
            ours, torch.zeros(5, 40, dtype=torch.int64), torch.ones(5, 40, dtype=torch.bool), ours.clone()
        )
        assert torch.equal(found[:, 1:], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(200, 4))
        changed = ours.clone()
        changed[..., 0] += 1
        found = token_measures(
            changed, torch.zeros(5, 40, dtype=torch.int64), torch.ones(5, 40, dtype=torch.bool), ours
        )
        assert bool((found[:, 2] > 0).any()) and bool((found[:, 1] != 0).any())


def test_small_divergences_are_resolved_and_never_negative() -> None:
    theirs = logits(1, 2000, 50)
    targets, counted = torch.zeros(1, 2000, dtype=torch.int64), torch.ones(1, 2000, dtype=torch.bool)
    ours = theirs + 0.01 * logits(1, 2000, 50, seed=1)
    p, q = (each.double().log_softmax(dim=-1)[0] for each in (theirs, ours))
    expected = (p.exp() * (p - q)).sum(dim=-1)
    found = token_measures(ours, targets, counted, theirs)[:, 2].double()
    assert float((found - expected).abs().max()) < 1e-6 and float(expected.mean()) > 1e-4
    nearly = token_measures(theirs + 1e-6, targets, counted, theirs)[:, 2]  # the same but for rounding
    assert float(nearly.min()) >= 0 and float(nearly.max()) < 1e-6


def test_tokens_that_both_exclude_cost_nothing_and_those_that_only_the_model_excludes_everything() -> None:
    excluded = -math.inf
    assert measure([0.0, 0.0, excluded], [0.0, 0.0, excluded])[2] == 0.0
    assert measure([0.0, 0.0, 0.0], [0.0, 0.0, excluded])[2] == pytest.approx(math.log(1.5))
    assert measure([0.0, 0.0, excluded], [0.0, 0.0, 0.0])[2] == math.inf


def test_nan_on_either_side_is_no_agreement_and_no_disagreement() -> None:
    good, bad = [0.0, 1.0, 2.0], [0.0, math.nan, 2.0]
    for found in (measure(bad, good), measure(good, bad), measure(bad, bad)):
        assert all(math.isnan(value) for value in found[1:])
    assert math.isfinite(measure(good, bad)[0]) and math.isnan(measure(bad, good)[0])


def test_only_counted_tokens_are_read_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = logits(3, 7, VOCABULARY), logits(3, 7, VOCABULARY, seed=1)
    targets = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
    counted = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    whole = token_measures(ours, targets, counted, theirs)
    assert whole.shape == (int(counted.sum()), 5) and 0 < len(whole) < 21
    monkeypatch.setattr(measures, "_CHUNK_ELEMENTS", 4 * VOCABULARY)
    parts = token_measures(ours, targets.where(counted, -100), counted, theirs)
    assert torch.allclose(whole, parts, rtol=1e-6, atol=1e-7)
    rows, columns = counted.nonzero(as_tuple=True)
    one_by_one = [
        measure(ours[r, c].tolist(), theirs[r, c].tolist(), int(targets[r, c]))
        for r, c in zip(rows, columns, strict=True)
    ]
    assert torch.allclose(whole, torch.tensor(one_by_one), rtol=1e-5, atol=1e-6)
    alone = token_measures(ours, targets, counted)
    assert alone.shape == (len(whole), len(LOSS_ONLY)) and torch.allclose(alone[:, 0], whole[:, 0])
    assert torch.equal(ours, logits(3, 7, VOCABULARY))  # the caller's logits are not written


def test_half_precision_is_measured_in_float32() -> None:
    uniform = [0.0] * 400
    loss = measure(uniform, uniform, dtype=torch.bfloat16)[0]
    assert loss == pytest.approx(math.log(400), rel=1e-6)


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
