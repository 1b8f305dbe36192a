from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion.analysis.quality import Quality, evaluate, record_logits

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


# --- against a reference ------------------------------------------------------------------------------


def quality_by_hand(model: TinyModel, reference: TinyModel, rows: list[list[int]]) -> dict[str, float]:
    """All measures over the given unpadded rows, token by token, from the definitions alone."""
    found: dict[str, list[float]] = {"kl": [], "top1": [], "top5": [], "loss_increase": []}
    q_rows, p_rows = (each.table.detach().double().softmax(dim=1).tolist() for each in (model, reference))
    for row in rows:
        for a, b in zip(row, row[1:], strict=False):
            q, p = q_rows[a], p_rows[a]
            best = p.index(max(p))
            found["kl"].append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
            found["top1"].append(float(q.index(max(q)) == best))
            found["top5"].append(float(best in sorted(range(VOCABULARY), key=lambda v: -q[v])[:5]))
            found["loss_increase"].append(math.log(p[b] / q[b]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def measures(result: Quality) -> dict[str, float]:
    return {name: float(getattr(result, name)) for name in ("kl", "top1", "top5", "loss_increase")}


def test_measures_against_a_reference_are_those_of_the_definitions() -> None:
    model, reference = TinyModel(), TinyModel()
    with torch.no_grad():
        reference.table += TinyModel(seed=5).table * 0.8
    padded, tokens = ids(3, 9), ids(2, 5, seed=2)  # two batch sizes and lengths
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :2] = 0
    mask[1, 6:] = 0
    rows = [padded[0, 2:].tolist(), padded[1, :6].tolist(), padded[2].tolist(), *tokens.tolist()]
    result = evaluate(model, [{"input_ids": padded, "attention_mask": mask}, tokens], reference)
    expected = quality_by_hand(model, reference, rows)
    assert measures(result) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["top1"] < expected["top5"] < 1  # the case can tell the two apart
    assert result.tokens == sum(len(row) - 1 for row in rows)
    difference = evaluate(model, [tokens]).loss.value - evaluate(reference, [tokens]).loss.value
    assert measures(evaluate(model, [tokens], reference))["loss_increase"] == pytest.approx(difference, rel=1e-5)


def test_loss_and_its_interval_do_not_depend_on_the_reference() -> None:
    model, batches = TinyModel(), [ids(6, 9)]
    alone, beside = evaluate(model, batches), evaluate(model, batches, TinyModel(seed=7))
    assert (alone.loss, alone.perplexity) == (beside.loss, beside.perplexity)
    assert (alone.kl, alone.top1, alone.top5, alone.loss_increase) == (None,) * 4


def test_the_same_model_is_at_no_distance_and_a_changed_one_is() -> None:
    """The control of every comparison: exactly nothing between a model and itself."""
    model, batches = TinyModel(), [ids(4, 9), ids(3, 7, seed=2)]
    same = evaluate(model, batches, reference=model)
    for estimate, value in ((same.kl, 0.0), (same.loss_increase, 0.0), (same.top1, 1.0), (same.top5, 1.0)):
        assert estimate is not None
        assert (estimate.value, estimate.low, estimate.high) == (value, value, value)
    changed = TinyModel()
    with torch.no_grad():
        changed.table[3, 5] += 0.01
    slightly = evaluate(changed, batches, reference=model)
    assert slightly.kl is not None and slightly.kl.value > 1e-8
    assert slightly.loss_increase is not None and slightly.loss_increase.value != 0
    with torch.no_grad():
        changed.table.neg_()
    wholly = evaluate(changed, batches, reference=model)
    assert wholly.top1 is not None and wholly.top1.value < 0.5
    assert wholly.top5 is not None and wholly.top5.value < 1


def test_the_interval_of_the_loss_increase_is_paired() -> None:
    """Both losses differ much between sequences, their difference hardly."""
    model, reference = TinyModel(), TinyModel()
    with torch.no_grad():
        model.table += 0.05 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
    result = evaluate(model, [ids(32, 9)], reference)
    assert result.loss_increase is not None
    assert result.loss_increase.high - result.loss_increase.low < 0.1 * (result.loss.high - result.loss.low)


def test_labels_and_nan_outside_of_them_hold_for_all_measures() -> None:
    tokens, labels = ids(2, 6), ids(2, 6)
    labels[:, 4:] = -100
    logits, broken = torch.randn(2, 6, VOCABULARY, generator=torch.Generator().manual_seed(0)), None
    broken = logits.clone()
    broken[:, 3:] = math.nan
    batch = {"input_ids": tokens, "labels": labels}
    whole = evaluate(lambda input_ids: logits, [batch], lambda input_ids: logits * 2)
    masked = evaluate(lambda input_ids: broken, [batch], lambda input_ids: broken * 2)
    assert masked == whole and whole.kl is not None and whole.kl.value > 0


def test_recorded_logits_replace_the_reference() -> None:
    model, reference = TinyModel(), TinyModel(seed=7).train()
    batches = [ids(3, 7), ids(2, 1), {"input_ids": ids(2, 5), "labels": ids(2, 5)}]
    recorded = record_logits(reference, batches)
    assert [list(logits.shape[:2]) for logits in recorded] == [[3, 7], [2, 1], [2, 5]]
    assert reference.training and reference.seen[0]["training"] is False
    assert "labels" not in reference.seen[2]
    calls = len(reference.seen)
    assert evaluate(model, batches, iter(recorded)) == evaluate(model, batches, recorded)
    assert len(reference.seen) == calls
    assert evaluate(model, batches, recorded) == evaluate(model, batches, reference)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ([torch.zeros(2, 5, VOCABULARY)], ValueError, "for 1 batches only: none for batch 1"),
        ([torch.zeros(2, 5, VOCABULARY)] * 3, ValueError, "more than these 2 batches"),
        ([torch.zeros(2, 4, VOCABULARY)] * 2, ValueError, r"the reference gave for batch 0 .* got \[2, 4, 11\]"),
        ([torch.zeros(2, 5, 12)] * 2, ValueError, "vocabulary has 12 entries, the model's 11"),
        (lambda tokens: "text", ValueError, "the reference returned str"),
        (TinyModel().to("meta"), ValueError, "the reference is on the meta device"),
        (5, TypeError, "reference must be a model"),
    ],
)
def test_bad_references(reference: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(TinyModel(), [ids(2, 5), ids(2, 5)], reference)


def test_both_models_get_their_modes_back() -> None:
    model, reference = TinyModel().train(), TinyModel(seed=7).eval()
    evaluate(model, [ids(2, 5)], reference)
    assert model.training and model.dropout.training and not reference.training
    assert model.seen[0]["training"] is False and reference.seen[0]["grad"] is False
    evaluate(model, [ids(2, 5)], model)
    assert model.training and model.dropout.training


def test_what_is_not_finite_is_blamed_on_the_right_model() -> None:
    tokens = ids(2, 6)
    good = torch.zeros(2, 6, VOCABULARY)
    nan, hole = good.clone(), good.clone()
    nan[1, 2, 3] = math.nan
    hole[..., (tokens.max() + 1) % VOCABULARY] = -math.inf  # the model excludes what the reference allows
    with pytest.warns(UserWarning, match="^the loss is not finite in 1 of 2 batches, first in batch 1$") as seen:
        result = evaluate(lambda x: nan if x[0, 0] else good, [tokens * 0, tokens * 0 + 1], lambda x: good)
    assert len(seen) == 1
    assert all(math.isnan(value) for value in measures(result).values())
    assert result.to_dict()["top1"] == {"value": None, "low": None, "high": None}
    with pytest.warns(UserWarning, match="the reference's loss is not finite in 1 of 1 batches, first in batch 0"):
        result = evaluate(lambda x: good, [tokens], lambda x: nan)
    assert math.isfinite(result.loss.value) and math.isfinite(result.loss.high)
    assert result.top1 is not None and math.isnan(result.top1.value)
    unseen = torch.zeros_like(tokens)  # its loss is finite: no target is the excluded token
    with pytest.warns(UserWarning, match="the KL divergence from the reference is not finite"):
        result = evaluate(lambda x: hole, [unseen], lambda x: good)
    assert result.kl is not None and result.kl.value == math.inf and math.isnan(result.kl.high)
    assert math.isfinite(result.loss.high)


def test_one_sequence_bounds_nothing_but_by_definition() -> None:
    result = evaluate(TinyModel(), [ids(1, 9)], TinyModel(seed=7))
    limits = {name: (getattr(result, name).low, getattr(result, name).high) for name in measures(result)}
    assert limits == {
        "kl": (0, math.inf),
        "top1": (0, 1),
        "top5": (0, 1),
        "loss_increase": (-math.inf, math.inf),
    }


def test_the_seed_decides_the_intervals() -> None:
    def loss(seed: int) -> Any:
        return evaluate(TinyModel(), [ids(8, 9)], seed=seed).loss

    assert loss(0) == loss(0) != loss(1)
    assert loss(0).value == loss(1).value
    with pytest.raises(ValueError, match="resamples must be at least 100"):
        evaluate(TinyModel(), [ids(8, 9)], resamples=10)
