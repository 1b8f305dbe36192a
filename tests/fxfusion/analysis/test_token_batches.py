from __future__ import annotations

from typing import Any

import pytest
import torch

from fxfusion.analysis.token_batches import read_batches

IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def test_a_tensor_counts_everywhere() -> None:
    first, second = read_batches(iter([IDS, {"input_ids": IDS[:1], "position_ids": IDS[:1]}]))
    assert (first.number, second.number) == (0, 1)
    assert first.inputs == {"input_ids": IDS} and set(second.inputs) == {"input_ids", "position_ids"}
    assert first.seen.all() and first.seen.shape == (2, 4)
    assert torch.equal(first.targets, IDS[:, 1:]) and first.counted.all() and first.counted.shape == (2, 3)


def test_padding_and_labels_say_what_counts() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[5, 6, -100, 8], [1, 2, 3, 4]])
    (batch,) = read_batches([{"input_ids": IDS, "attention_mask": mask, "labels": labels}])
    assert "labels" not in batch.inputs and "attention_mask" in batch.inputs
    assert batch.seen.tolist() == [[False, True, False, True], [True, True, True, False]]
    # The prediction at a token counts if the next one does, and neither is padding.
    assert batch.counted.tolist() == [[False, False, True], [True, True, False]]


def test_the_digest_tells_all_inputs_apart() -> None:
    variants: list[Any] = [
        IDS,
        IDS.flip(0),
        IDS.int(),
        IDS.reshape(1, 8),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        {"input_ids": IDS, "labels": IDS},
        {"input_ids": IDS, "flag": True},
        {"input_ids": IDS, "flag": False},
    ]
    keys = [batch.key for batch in read_batches(variants)]
    assert len(set(keys)) == len(keys)
    assert keys == [batch.key for batch in read_batches(variants)]
    assert read_batches([{"input_ids": IDS.clone()}])[0].key == keys[0]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        pytest.param(iter([]), ValueError, "used up only once", id="used-up"),
        (IDS, TypeError, "wrap a single batch in a list"),
        ([IDS, IDS[0]], ValueError, r"batch 1 must hold integer `input_ids` \[batch, seq\], got torch.int64 \[4\]"),
        ([IDS.float()], ValueError, "got torch.float32"),
        ([{"labels": IDS}], ValueError, "got NoneType"),
        ([IDS[:, :1]], ValueError, r"batch 0 is \[2, 1\]: it takes a sequence of at least two tokens"),
        ([IDS[:0]], ValueError, r"batch 0 is \[0, 4\]"),
        ([{"input_ids": IDS, "labels": IDS[:, 1:]}], ValueError, r"labels of batch 0 are \[2, 3\], its ids \[2, 4\]"),
        ([{"input_ids": IDS, "attention_mask": IDS[:1]}], ValueError, "attention_mask of batch 0"),
        ([{"input_ids": IDS, "attention_mask": IDS * 0}], ValueError, "no token counts"),
        (["text"], TypeError, "batch 0 must be a tensor"),
    ],
    ids=str,
)
def test_bad_batches_are_errors(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_batches(batches)
