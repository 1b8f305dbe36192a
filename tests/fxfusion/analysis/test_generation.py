from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxfusion.analysis.generation import GreedyAgreement, greedy_agreement

VOCABULARY = 13


class Counter(nn.Module):
    """Writes the next number, modulo the vocabulary; from `wrong_from` on (a position) the one after that."""

    def __init__(self, wrong_from: int = 10**6) -> None:
        super().__init__()
        self.wrong_from = wrong_from
        self.shapes: list[list[int]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.shapes.append(list(ids.shape))
        late = torch.arange(1, ids.shape[1] + 1) >= self.wrong_from  # the position that is predicted
        return nn.functional.one_hot((ids + 1 + late.long()) % VOCABULARY, VOCABULARY).float()


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    settings: dict[str, Any] = {"num_attention_heads": 2, "initializer_range": 0.5, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings, **config})).eval()


def prompts(*lengths: int, vocabulary: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]


def full(result: GreedyAgreement, length: float) -> bool:
    """Whether the two models agreed in everything."""
    return [result.length.value, result.share.value, result.equal.value] == [length, 1.0, 1.0]


def test_values_by_hand() -> None:
    """From prompts of 2, 3 and 30 tokens, a model that goes astray at position 8 agrees for 6, 5 and 0 tokens."""
    given = [torch.tensor([0, 1]), torch.tensor([4, 5, 6]), torch.zeros(30, dtype=torch.int64)]
    result = greedy_agreement(Counter(wrong_from=8), Counter(), given, max_new_tokens=6)
    assert result.length.value == pytest.approx((6 + 5 + 0) / 3)
    assert result.share.value == pytest.approx((6 + 5 + 0) / 18)
    assert result.equal.value == pytest.approx(1 / 3)
    assert (result.prompts, result.max_new_tokens) == (3, 6)
    first, second, third = result.samples
    assert first.prompt == (0, 1) and first.model == first.reference == (2, 3, 4, 5, 6, 7) and first.agreed == 6
    assert second.reference == (7, 8, 9, 10, 11, 12) and second.model == (7, 8, 9, 10, 11, 0) and second.agreed == 5
    assert third.reference[0] == 1 and third.model[0] == 2 and third.agreed == 0


def test_the_same_model_agrees_in_full_and_a_changed_one_does_not() -> None:
    """The control, for `generate` with a cache and for the plain loop."""
    model, changed = llama(), llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(-1)
    given = prompts(3, 5, 5, 9)
    assert full(greedy_agreement(model, model, given, 12), 12)
    assert full(greedy_agreement(model, llama(), given, 12), 12)
    result = greedy_agreement(changed, model, given, 12)
    assert result.share.value < 1 and result.equal.value < 1
    assert full(greedy_agreement(Counter(), Counter(), given, 12), 12)


def test_generate_and_the_plain_loop_write_the_same() -> None:
    model, given = llama(), prompts(3, 5, 5, 9)
    assert len({sample.model for sample in greedy_agreement(model, model, given, 12, samples=4).samples}) > 1
    assert full(greedy_agreement(lambda ids: model(ids), model, given, 12), 12)
    assert not full(greedy_agreement(lambda ids: llama(seed=1)(ids), model, given, 12), 12)


def test_the_writer_is_generate_only_where_it_runs_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile(model).generate` runs the module that is not compiled: it must not be measured instead."""
    model, calls = llama(), []
    own = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, **given: calls.append(1) or own(self, **given))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    assert full(greedy_agreement(compiled, llama(), prompts(4), 5), 5)  # type: ignore[arg-type]
    assert calls == [1] and graphs
    torch.compiler.reset()


def test_the_plain_loop_keeps_one_shape_for_each_length_of_prompt() -> None:
    model = Counter()
    greedy_agreement(model, Counter(), prompts(3, 5, 3, 3, vocabulary=VOCABULARY), 4, batch=2)
    assert {tuple(shape) for shape in model.shapes} == {(2, 7), (1, 7), (1, 9)}


def test_the_order_of_prompts_stays() -> None:
    given = prompts(9, 2, 9, 4, 2, vocabulary=VOCABULARY)
    result = greedy_agreement(Counter(), Counter(), given, 3, batch=2, samples=5)
    assert [list(sample.prompt) for sample in result.samples] == [ids.tolist() for ids in given]
    assert [sample.model[0] for sample in result.samples] == [(int(ids[-1]) + 1) % VOCABULARY for ids in given]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    given = prompts(3, 6)
    ids, mask = torch.full((2, 6), 7), torch.zeros(2, 6, dtype=torch.int64)
    for row, prompt in enumerate(given):
        place = slice(6 - len(prompt), 6) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    model, reference = llama(), llama(seed=1)
    padded = greedy_agreement(model, reference, [{"input_ids": ids, "attention_mask": mask}], 8)
    assert padded == greedy_agreement(model, reference, given, 8)
    assert padded == greedy_agreement(model, reference, [prompt.tolist() for prompt in given], 8)
    assert padded.share.value < 1


def test_a_stop_ends_a_continuation_and_belongs_to_it() -> None:
    given = [[0, 1], [4, 5, 6]]
    result = greedy_agreement(Counter(), Counter(), given, 6, eos_token_id=8)
    assert [sample.model for sample in result.samples] == [(2, 3, 4, 5, 6, 7), (7, 8)]
    assert full(result, 4)
    assert full(greedy_agreement(Counter(), Counter(), given, 6, eos_token_id=[8, 4]), 2.5)
    stopped = greedy_agreement(Counter(wrong_from=4), Counter(), given, 6, eos_token_id=8)
    assert stopped.share.value == pytest.approx((2 + 1) / (6 + 2))


def test_generate_stops_where_the_loop_stops() -> None:
    model, given = llama(), prompts(3, 5, 5, 9)
    free = greedy_agreement(model, model, given, 12, samples=4)
    stop = free.samples[1].model[4]
    by_loop = greedy_agreement(lambda ids: model(ids), model, given, 12, eos_token_id=stop, samples=4)
    assert by_loop.length.value < 12 and by_loop.equal.value == 1
    assert by_loop.samples[1].model == free.samples[1].model[:5]


def test_the_stop_of_the_reference_holds_for_both() -> None:
    model, reference = llama(), llama()
    stop = greedy_agreement(model, model, prompts(4), 6).samples[0].model[2]
    reference.generation_config.eos_token_id = stop
    assert full(greedy_agreement(model, reference, prompts(4), 6), 3)
    assert full(greedy_agreement(reference, model, prompts(4), 6), 3)
    assert full(greedy_agreement(model, reference, prompts(4), 6, eos_token_id=[]), 6)
    assert model.generation_config.eos_token_id is None


def test_penalties_and_sampling_of_the_models_config_are_not_used_and_stay() -> None:
    model = llama()
    plain = greedy_agreement(model, model, prompts(4), 8).samples[0].model
    model.generation_config.update(do_sample=True, temperature=9.0, suppress_tokens=list(plain), max_new_tokens=2)
    before = model.generation_config.to_dict()
    assert greedy_agreement(model, model, prompts(4), 8).samples[0].model == plain
    assert model.generation_config.to_dict() == before


def test_modes_come_back() -> None:
    model, reference = llama().train(), Counter().train()
    reference.wrong_from = 0
    greedy_agreement(model, lambda ids: nn.functional.one_hot(ids, 50).float(), prompts(4), 2)
    greedy_agreement(reference, reference, [[1, 2]], 2)
    assert model.training and model.model.layers[0].training and reference.training


class Words:
    """A tokenizer of words that are numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_texts_as_prompts_and_samples_as_texts() -> None:
    result = greedy_agreement(Counter(wrong_from=4), Counter(), ["1 2", "3 4"], 3, tokenizer=Words(), samples=1)
    (sample,) = result.samples
    assert (sample.prompt_text, sample.reference_text, sample.model_text) == ("1 2", "3 4 5", "3 4 6")
    assert result.prompts == 2
    parsed = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert parsed["samples"][0]["model"] == [3, 4, 6] and parsed["share"]["value"] == pytest.approx(2 / 3)
    assert parsed["samples"][0]["model_text"] == "3 4 6" and parsed["prompts"] == 2


def test_intervals_are_over_prompts() -> None:
    given = [[0] * length for length in range(1, 21)]
    result = greedy_agreement(Counter(wrong_from=12), Counter(), given, 8)
    for estimate in (result.length, result.share, result.equal):
        assert estimate.low < estimate.value < estimate.high
    assert result == greedy_agreement(Counter(wrong_from=12), Counter(), given, 8)
    alone = greedy_agreement(Counter(wrong_from=12), Counter(), given[:1], 8)
    assert (alone.length.low, alone.length.high) == (0, 8) and (alone.equal.low, alone.equal.high) == (0, 1)


def test_progress_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def given() -> Iterator[list[int]]:
        yield from ([1, 2], [3])

    assert full(greedy_agreement(Counter(), Counter(), given(), 2, progress=True), 2)
    assert "generate" in capsys.readouterr().err


class Average(nn.Module):
    """Every position sees every token: no causal model."""

    def forward(self, ids: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(ids % VOCABULARY, VOCABULARY).float()
        return one_hot.mean(dim=1, keepdim=True).expand_as(one_hot)


def test_a_model_that_reads_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is not causal"):
        greedy_agreement(Average(), Counter(), [[1, 2]], 4)
    with pytest.raises(ValueError, match="the reference is not causal"):
        greedy_agreement(Counter(), Average(), [[1, 2]], 4)


def test_tokens_that_are_never_allowed_do_not_hide_a_model_that_reads_ahead() -> None:
    def excluding(model: nn.Module) -> Any:
        return lambda ids: model(ids).index_fill(2, torch.tensor([0]), -math.inf)

    with pytest.raises(ValueError, match="the model is not causal"):
        greedy_agreement(excluding(Average()), Counter(), [[1, 2]], 4)
    assert full(greedy_agreement(excluding(Counter()), Counter(), [[1, 2]], 4), 4)


def test_nan_is_an_error_in_both_ways_of_writing() -> None:
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = math.nan
    for model in (broken, lambda ids: broken(ids)):
        with pytest.raises(ValueError, match="logits of the model are NaN during generation"):
            greedy_agreement(model, llama(), prompts(4), 4)
    with pytest.raises(ValueError, match="logits of the reference are NaN"):
        greedy_agreement(llama(), broken, prompts(4), 4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "there are no prompts"),
        (["text"], ValueError, "prompt 0 is a text: give a tokenizer"),
        ([[1], []], ValueError, "prompt 1 has no token"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}], ValueError, "prompt 0 has no token"),
        ([{"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}], ValueError, "padding between its tokens"),
        ([{"input_ids": [[1]], "pixel_values": 1}], ValueError, r"it has \['input_ids', 'pixel_values'\]"),
        ([{"text": "words"}], ValueError, r"it has \['text'\]"),
        ([torch.zeros(2, 3)], ValueError, "must be integer token ids"),
        ([torch.zeros(1, 2, 3, dtype=torch.int64)], ValueError, r"got torch.int64 \[1, 2, 3\]"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1]]}], ValueError, r"mask \[1, 1\]"),
        ([5], TypeError, "prompt 0 must be token ids or a text, got int"),
    ],
)
def test_bad_prompts(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        greedy_agreement(Counter(), Counter(), given, 4)


def test_bad_numbers_and_models() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 8"):
        greedy_agreement(Counter(), Counter(), [[1]], 0)
    with pytest.raises(ValueError, match="the reference is on the meta device"):
        greedy_agreement(llama(), llama().to("meta"), prompts(3), 4)
