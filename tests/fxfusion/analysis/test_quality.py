from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion.analysis import quality
from fxfusion.analysis.quality import Estimate, evaluate

VOCABULARY = 11


class TinyModel(nn.Module):
    """Logits out of the current token alone; `seen` records what each call was given."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 2)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        self.seen.append({"grad": torch.is_grad_enabled(), "training": self.training, **inputs})
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


class LogitsOnly(nn.Module):
    """A model that returns given logits, in a form of the test's choice."""

    def __init__(self, logits: Tensor, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.logits, self.wrap = logits, wrap

    def forward(self, ids: Tensor) -> Any:
        return self.wrap(self.logits[: ids.shape[0]])


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model: TinyModel, tokens: Tensor) -> list[list[float]]:
    """Loss of every next token, with nothing but the definition of softmax."""
    table = model.table.detach().double().exp()
    probability = table / table.sum(dim=1, keepdim=True)
    rows = tokens.tolist()
    return [[-math.log(probability[a, b]) for a, b in zip(row, row[1:], strict=False)] for row in rows]


def test_loss_is_the_mean_over_all_tokens_of_all_batches() -> None:
    model, batches = TinyModel(), [ids(3, 7), ids(2, 5, seed=2)]
    losses = [loss for batch in batches for row in by_hand(model, batch) for loss in row]
    result = evaluate(model, batches)
    assert result.tokens == len(losses) == 3 * 6 + 2 * 4
    assert result.sequences == 5
    assert float(result.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert float(result.perplexity) == pytest.approx(math.exp(float(result.loss)))


def test_uniform_logits_give_the_vocabulary_as_perplexity() -> None:
    result = evaluate(LogitsOnly(torch.zeros(4, 6, VOCABULARY)), [ids(4, 6)])
    assert result.perplexity.value == pytest.approx(VOCABULARY)
    assert result.loss.low == pytest.approx(result.loss.high)


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: [x], lambda x: {"logits": x}, lambda x: x])
def test_every_form_of_output_is_understood(wrap: Any) -> None:
    result = evaluate(LogitsOnly(torch.zeros(2, 6, VOCABULARY), wrap), [ids(2, 6)])
    assert result.loss.value == pytest.approx(math.log(VOCABULARY))


def test_masked_tokens_do_not_count_on_either_side() -> None:
    model, tokens = TinyModel(), ids(3, 6)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, :2] = 0  # left padding: the first real token has no real predecessor
    mask[1, 4:] = 0  # right padding
    rows = by_hand(model, tokens)
    expected = rows[0][2:] + rows[1][:3] + rows[2]
    result = evaluate(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert result.tokens == len(expected)
    assert result.loss.value == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert model.seen[0]["attention_mask"] is mask or torch.equal(model.seen[0]["attention_mask"], mask)


def test_padding_changes_nothing() -> None:
    model, tokens = TinyModel(), ids(2, 6)
    padded = torch.cat([tokens, ids(2, 3, seed=5)], dim=1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], dim=1).bool()
    assert evaluate(model, [{"input_ids": padded, "attention_mask": mask}]) == evaluate(model, [tokens])


def test_labels_choose_the_targets_and_stay_out_of_the_call() -> None:
    model, tokens = TinyModel(), ids(2, 6)
    labels = tokens.clone()
    labels[:, :4] = -100
    rows = by_hand(model, tokens)
    expected = rows[0][3:] + rows[1][3:]
    result = evaluate(model, [{"input_ids": tokens, "labels": labels, "extra": "kept"}])
    assert result.tokens == 4
    assert result.loss.value == pytest.approx(sum(expected) / 4, rel=1e-6)
    assert "labels" not in model.seen[0] and model.seen[0]["extra"] == "kept"
    assert labels[0, 4] == tokens[0, 4]  # the caller's tensors are not written


def test_nan_in_a_masked_token_does_not_count() -> None:
    logits = torch.zeros(2, 6, VOCABULARY)
    logits[:, 4:] = math.nan
    labels = ids(2, 6)
    labels[:, 5:] = -100
    result = evaluate(lambda input_ids: logits, [{"input_ids": ids(2, 6), "labels": labels}])
    assert result.loss.value == pytest.approx(math.log(VOCABULARY))


def test_chunks_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = TinyModel(), [ids(3, 17)]
    whole = evaluate(model, batches)
    monkeypatch.setattr(quality, "_CHUNK_ELEMENTS", 5 * VOCABULARY)
    assert evaluate(model, batches).loss.value == pytest.approx(whole.loss.value, rel=1e-7)


def test_half_precision_logits_are_measured_in_float32() -> None:
    logits = torch.full((1, 400, VOCABULARY), 0.0, dtype=torch.bfloat16)
    result = evaluate(LogitsOnly(logits), [ids(1, 400)])
    assert result.loss.value == pytest.approx(math.log(VOCABULARY), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_every_submodule_gets_its_mode_back(training: bool) -> None:
    model = TinyModel().train(training)
    model.dropout.train(not training)
    evaluate(model, [ids(2, 5)])
    assert model.training is training and model.dropout.training is (not training)
    assert model.seen[0]["training"] is False and model.seen[0]["grad"] is False


def test_mode_comes_back_after_an_error() -> None:
    model = TinyModel().train()
    with pytest.raises(ValueError, match="batch, seq"):
        evaluate(model, [ids(5)])
    assert model.training and model.dropout.training and torch.is_grad_enabled()


def test_compiled_module() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, VOCABULARY)
            self.dropout = nn.Dropout(0.5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.dropout(self.table(tokens))  # type: ignore[no-any-return]

    plain = Plain().train()
    compiled = torch.compile(plain, backend="eager")
    batches = [ids(2, 5)]
    assert evaluate(compiled, batches).loss.value == pytest.approx(evaluate(plain, batches).loss.value)  # type: ignore[arg-type]
    assert plain.training and plain.dropout.training


def test_interval_contains_the_value_and_shrinks_with_more_text() -> None:
    model = TinyModel()
    few, many = evaluate(model, [ids(8, 16)]), evaluate(model, [ids(8, 16, seed=s) for s in range(64)])
    for result in (few, many):
        for estimate in (result.loss, result.perplexity):
            assert estimate.low < estimate.value < estimate.high
    assert many.loss.high - many.loss.low < 0.3 * (few.loss.high - few.loss.low)


def test_interval_is_the_normal_one_for_equal_lengths() -> None:
    model, tokens = TinyModel(), ids(6, 9)
    means = torch.tensor([sum(row) / len(row) for row in by_hand(model, tokens)], dtype=torch.float64)
    margin = 1.959964 * float(means.std()) / math.sqrt(6)
    loss = evaluate(model, [tokens]).loss
    assert loss.high - loss.value == pytest.approx(margin, rel=1e-4)
    assert loss.value - loss.low == pytest.approx(margin, rel=1e-4)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Uniform tokens: the expected loss is known exactly, so coverage can be counted."""
    model = TinyModel()
    truth = float((-model.table.detach().log_softmax(dim=1)).mean())
    hits = 0
    for seed in range(200):
        loss = evaluate(model, [ids(40, 8, seed=100 + seed)]).loss
        hits += loss.low <= truth <= loss.high
    assert 180 <= hits <= 199


def test_one_sequence_has_an_unbounded_interval_and_valid_json() -> None:
    result = evaluate(TinyModel(), [ids(1, 9)])
    assert (result.loss.low, result.loss.high) == (0.0, math.inf)
    assert (result.perplexity.low, result.perplexity.high) == (1.0, math.inf)
    parsed = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert parsed["loss"]["high"] is None
    assert parsed["tokens"] == 8 and parsed["loss"]["value"] == pytest.approx(result.loss.value)


def test_nan_loss_is_reported() -> None:
    logits = torch.zeros(2, 6, VOCABULARY)
    logits[1] = math.nan
    with pytest.warns(UserWarning, match="1 of 2 batches, first in batch 1"):
        result = evaluate(LogitsOnly(logits), [ids(1, 6), ids(2, 6)])
    assert math.isnan(result.loss.value) and math.isnan(result.perplexity.value)
    assert math.isnan(result.loss.low) and "nan" in str(result.loss)
    assert result.to_dict()["perplexity"]["value"] is None


def test_infinite_loss_is_reported() -> None:
    logits = torch.zeros(2, 6, VOCABULARY)
    logits[0, 0, :] = -math.inf
    logits[0, 0, 0] = 0.0
    tokens = torch.ones(2, 6, dtype=torch.int64)
    with pytest.warns(UserWarning, match="not finite"):
        assert evaluate(LogitsOnly(logits), [tokens]).perplexity.value == math.inf


def test_a_very_bad_model_has_an_infinite_perplexity_not_an_error() -> None:
    logits = torch.zeros(1, 3, VOCABULARY)
    logits[..., 0] = 5000.0
    result = evaluate(LogitsOnly(logits), [torch.ones(1, 3, dtype=torch.int64)])
    assert result.loss.value == pytest.approx(5000) and result.perplexity.value == math.inf


def test_batches_without_a_countable_token_are_passed_over() -> None:
    model, tokens = TinyModel(), ids(2, 5)
    extra = [ids(0, 5), ids(2, 1), {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}]
    assert evaluate(model, [*extra, tokens]) == evaluate(model, [tokens])
    assert len(model.seen) == 2


def test_a_generator_is_enough_and_progress_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def stream() -> Iterator[Tensor]:
        yield from (ids(2, 5, seed=s) for s in range(3))

    model = TinyModel()
    assert evaluate(model, stream(), progress=True) == evaluate(model, list(stream()))
    capsys.readouterr()


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        ([ids(2, 1)], ValueError, "no token counts"),
        ([{"input_ids": ids(2, 5), "attention_mask": torch.zeros(2, 5)}], ValueError, "no token counts"),
        (ids(2, 5), ValueError, r"batch 0 must hold integer token ids \[batch, seq\]"),
        ([torch.zeros(2, 5)], ValueError, "torch.float32"),
        ({"input_ids": ids(2, 5)}, TypeError, "wrap a single batch in a list"),
        ([{"inputs_embeds": torch.zeros(2, 5, 3)}], ValueError, "neither `input_ids` nor `labels`"),
        ([{"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 1, 5, 5)}], ValueError, "mask of batch 0"),
    ],
)
def test_bad_batches(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(TinyModel(), batches)


def test_bad_outputs() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 11\]"):
        evaluate(lambda tokens: torch.zeros(2, VOCABULARY), [ids(2, 5)])
    with pytest.raises(ValueError, match="no logits"):
        evaluate(lambda tokens: "text", [ids(2, 5)])
    with pytest.raises(ValueError, match="weights are missing"):
        evaluate(TinyModel().to("meta"), [ids(2, 5)])


def test_estimate_reads_like_a_number() -> None:
    estimate = Estimate(12.3456, 12.1, 12.6)
    assert float(estimate) == 12.3456
    assert f"{estimate:.2f}" == "12.35"
    assert f"{estimate}" == str(estimate) == "12.35 [12.1, 12.6]"
    with pytest.raises(AttributeError):
        estimate.value = 1.0  # type: ignore[misc]
