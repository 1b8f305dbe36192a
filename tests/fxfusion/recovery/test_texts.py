"""What is fitted to and what decides; text that is of no use."""

from __future__ import annotations

import pytest
import torch

from fxfusion.errors import OptionError
from fxfusion.recovery.texts import Texts
from tests.fxfusion.recovery.own_text import model_of, own_text


def ids(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, 8), generator=torch.Generator().manual_seed(seed))


def test_one_batch_in_eight_decides() -> None:
    batches = [ids(2, seed) for seed in range(17)]
    texts = Texts.of(batches, None)
    assert [batch.inputs["input_ids"] is not None for batch in texts.decide] == [True, True]
    assert texts.decide_given == (batches[7], batches[15]) and len(texts.fit) == 15
    assert texts.tokens == 15 * 16


def test_of_few_batches_rows_decide() -> None:
    mask = torch.ones(9, 8, dtype=torch.long)
    texts = Texts.of([{"input_ids": ids(9, 0), "attention_mask": mask}], None)
    assert texts.fit_given[0]["input_ids"].shape == (8, 8) and texts.decide_given[0]["attention_mask"].shape == (1, 8)
    assert [len(part) for part in (Texts.of([ids(1, 0), ids(1, 1)], None).fit_given)] == [1]


def test_given_text_decides_and_both_have_one_fingerprint() -> None:
    one, other = Texts.of([ids(1, 0)], [ids(1, 1)]), Texts.of([ids(1, 0)], [ids(1, 2)])
    assert one.tokens == 8 and one.fingerprint != other.fingerprint
    assert one.fingerprint == Texts.of([ids(1, 0)], [ids(1, 1)]).fingerprint


def test_too_little_is_refused() -> None:
    with pytest.raises(OptionError, match="one sequence cannot"):
        Texts.of([ids(1, 0)], None)
    with pytest.raises(ValueError, match="empty"):
        Texts.of([], None)
    with pytest.raises(TypeError, match="wrap a single batch"):
        Texts.of(ids(2, 0), None)


def test_few_tokens_for_many_channels_warn() -> None:
    texts = Texts.of([ids(4, 0)], [ids(1, 1)])
    texts.check_width(8, "the layer")
    with pytest.warns(UserWarning, match="32 calibration tokens are few for the 9 channels of the layer: at least 36"):
        texts.check_width(9, "the layer")


def test_noise_is_refused_and_the_models_own_text_is_not() -> None:
    model = model_of()
    Texts.of(own_text(), None).check_language(model, 97)
    with pytest.raises(OptionError, match="noise, or another language"):
        Texts.of([ids(8, 0), ids(8, 1)], None).check_language(model, 97)
