from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.analysis.scores import AttentionScores, attention_scores
from fxfusion.errors import CaptureError, OptionError
from fxfusion.models.traced import TracedModel
from tests.end_to_end.families import first_tensor, layers_of
from tests.fxfusion.models import tiny
from tests.fxfusion.models.tiny import Causal, causal, family_model, token_ids, traced_family

BATCHES = [token_ids(3, 6), token_ids(2, 8, seed=2)]


def model_of(layers: int = 4) -> Causal:
    """A model in which attention matters, and matters differently in each layer."""
    model = causal(*[tiny.plain] * layers)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.mix.out.weight.mul_(1.5 - 0.3 * number)
    return model


@lru_cache
def shared(layers: int = 4) -> tuple[Causal, TracedModel]:
    """The same for tests that do not change it, captured once."""
    model = model_of(layers)
    return model, TracedModel(model)


# --- the same by hooks, without graphs ----------------------------------------------------------------


@torch.no_grad()
def logits_without(model: nn.Module, attentions: Sequence[nn.Module], ids: Tensor, **inputs: Any) -> Tensor:
    with ExitStack() as stack:
        for attention in attentions:
            stack.callback(attention.register_forward_hook(tiny.zero, with_kwargs=True).remove)
        return first_tensor(model(ids, **inputs)).double()


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """`[batch, seq - 1]`"""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    p, q = reference.log_softmax(-1)[:, :-1], logits.log_softmax(-1)[:, :-1]
    return (p.exp() * (p - q)).sum(-1)


def expected_costs(model: Causal, dropped: Sequence[int], batches: Sequence[Tensor] = BATCHES) -> tuple[float, float]:
    """Loss increase and KL divergence without some attention, means over all predicted tokens."""
    increases, kls = [], []
    for ids in batches:
        intact = logits_without(model, [], ids)
        without = logits_without(model, [model.layers[layer].mix for layer in dropped], ids)
        increases.append((losses(without, ids) - losses(intact, ids)).flatten())
        kls.append(divergences(intact, without).flatten())
    return float(torch.cat(increases).mean()), float(torch.cat(kls).mean())


def expected_turns(model: Causal, ids: Tensor, dropped: Sequence[int] = ()) -> list[Tensor]:
    """1 - cos(x, x + attention(x)) in each plain layer: `[batch, seq]` each."""
    turns = []
    with torch.no_grad():
        x = model.embed(ids)
        for number, layer in enumerate(model.layers):
            after = x if number in dropped else x + layer.mix(x)
            turns.append(1 - F.cosine_similarity(x, after, dim=-1))
            x = after + layer.ffn(layer.norm(after))
    return turns


# --- each method --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["loss", "kl"])
def test_loss_and_kl_are_those_of_the_model_without_the_attention(method: Any) -> None:
    model, traced = shared()
    found = attention_scores(traced, BATCHES, method)
    which = ("loss", "kl").index(method)
    for layer in range(4):
        assert float(found[layer]) == pytest.approx(expected_costs(model, [layer])[which], rel=1e-5)
    assert len({round(float(score), 4) for score in found.scores}) == 4
    assert found.layers == (0, 1, 2, 3) and found.method == method
    assert [score.name for score in found.scores] == [f"layers.{layer}.mix" for layer in range(4)]
    assert (found.tokens, found.sequences) == (3 * 5 + 2 * 7, 5)
    assert found.steps == found.order == found.curve == ()


def test_cosine_is_how_far_attention_turns_the_stream() -> None:
    model, traced = shared()
    found = attention_scores(traced, BATCHES, "cosine")
    turns = [expected_turns(model, ids) for ids in BATCHES]
    for layer in range(4):
        expected = torch.cat([turn[layer].flatten() for turn in turns]).mean()
        assert float(found[layer]) == pytest.approx(float(expected), rel=1e-5)
        assert float(expected) > 1e-3
    assert (found.method, found.tokens, found.sequences) == ("cosine", 3 * 6 + 2 * 8, 5)


@pytest.mark.parametrize(("unit", "parts"), [("ffn", ["ffn"]), ("block", ["mix", "ffn"])])
def test_ffns_and_whole_layers_are_scored_likewise(unit: Any, parts: list[str], tmp_path: Path) -> None:
    model, traced = shared()

    def without(*layers: int) -> float:
        gone = [getattr(model.layers[layer], part) for layer in layers for part in parts]
        pairs = [
            (losses(logits_without(model, gone, ids), ids), losses(logits_without(model, [], ids), ids))
            for ids in BATCHES
        ]
        return float(torch.cat([(one - intact).flatten() for one, intact in pairs]).mean())

    cache = tmp_path / "scores.json"
    attention = attention_scores(traced, BATCHES, "loss", cache=cache)
    found = attention_scores(traced, BATCHES, "loss", unit=unit, greedy=True, drop=2, cache=cache)
    assert found != attention, "the file keeps them apart"
    assert [float(found[layer]) for layer in range(4)] == pytest.approx(
        [without(layer) for layer in range(4)], rel=1e-4
    )
    first = min(range(4), key=without)
    second = min(set(range(4)) - {first}, key=lambda layer: without(first, layer))
    assert found.order == (first, second) and float(found.curve[-1]) == pytest.approx(without(first, second), rel=1e-4)


def test_the_cosine_of_a_block_is_how_far_the_layer_turns_the_stream() -> None:
    model, traced = shared()
    found = attention_scores(traced, BATCHES, "cosine", unit="block")
    turns: list[list[Tensor]] = [[] for _ in range(4)]
    with torch.no_grad():
        for ids in BATCHES:
            x = model.embed(ids)
            for layer, turn in zip(model.layers, turns, strict=True):
                after = layer(x)
                turn.append((1 - F.cosine_similarity(x, after, dim=-1)).flatten())
                x = after
    for layer, turn in enumerate(turns):
        assert float(found[layer]) == pytest.approx(float(torch.cat(turn).mean()), rel=1e-5)


def test_the_ranking_starts_with_the_cheapest() -> None:
    found = attention_scores(shared()[1], BATCHES, "kl")
    values = [float(found[layer]) for layer in found.ranking]
    assert values == sorted(values) and sorted(found.ranking) == [0, 1, 2, 3]
    assert found.ranking != found.layers


@pytest.mark.parametrize("method", ["cosine", "loss", "kl"])
def test_an_attention_that_adds_nothing_costs_nothing(method: Any) -> None:
    model = model_of(3)
    with torch.no_grad():
        model.layers[1].mix.out.weight.zero_()
    found = attention_scores(model, BATCHES[:1], method)
    assert found[1].value.value == found[1].value.low == found[1].value.high == found[1].error == 0.0
    assert float(found[0]) != 0.0 != float(found[2])


def test_intervals_and_errors_come_from_sequences() -> None:
    model, traced = shared(2)
    batches = [token_ids(16, 6)]
    found = attention_scores(traced, batches, "kl")
    intact = logits_without(model, [], batches[0])
    means = divergences(intact, logits_without(model, [model.layers[0].mix], batches[0])).mean(dim=1)
    assert found[0].error == pytest.approx(float(means.std()) / 4, rel=1e-5)
    assert found[0].value.low < float(means.mean()) < found[0].value.high
    alone = attention_scores(traced, [batches[0][:1]], "kl")
    assert alone[0].error is None and alone[0].value.high == math.inf
    again = attention_scores(traced, batches, "kl", seed=1)
    assert again[0].value.value == found[0].value.value and again[0].value.low != found[0].value.low


def padded() -> tuple[TracedModel, Tensor, Tensor]:
    """A transformers model, token ids `[2, 6]`, and a mask of the same shape."""
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(4))
    return traced_family("llama"), ids, torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("method", ["cosine", "loss", "kl"])
def test_padding_and_labels_leave_tokens_out(method: Any) -> None:
    """Two ways to say the same must agree with the text cut short."""
    model, ids, mask = padded()
    expected = attention_scores(model, [ids[:1, :4], ids[1:]], method)
    masked = attention_scores(model, [{"input_ids": ids, "attention_mask": mask}], method)
    labels = ids.masked_fill(mask == 0, -100)
    labelled = attention_scores(model, [{"input_ids": ids, "labels": labels}], method)
    everywhere = attention_scores(model, [ids], method)
    assert expected.tokens == masked.tokens == labelled.tokens < everywhere.tokens
    for layer in range(4):
        assert float(masked[layer]) == pytest.approx(float(expected[layer]), rel=1e-4, abs=1e-7)
        assert float(labelled[layer]) == pytest.approx(float(expected[layer]), rel=1e-4, abs=1e-7)
        assert float(everywhere[layer]) != pytest.approx(float(expected[layer]), rel=1e-3)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_parallel_and_sandwich_attention(name: str) -> None:
    family, model = family_model(name)
    traced = traced_family(name)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    attentions = [layer.get_submodule(family.mixers[0]) for layer in layers_of(model, family)]
    intact = logits_without(model, [], ids, use_cache=False)
    found = attention_scores(traced, [ids], "kl")
    for layer, attention in enumerate(attentions):
        without = logits_without(model, [attention], ids, use_cache=False)
        assert float(found[layer]) == pytest.approx(float(divergences(intact, without).mean()), rel=1e-4)
    turned = attention_scores(traced, [ids], "cosine")
    streams: list[Tensor] = []
    handle = layers_of(model, family)[2].register_forward_pre_hook(
        lambda module, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    after = attentions[2] if name == "gpt_neox" else layers_of(model, family)[2].post_attention_layernorm
    added: list[Tensor] = []
    other = after.register_forward_hook(lambda module, args, output: added.append(first_tensor(output)))
    logits_without(model, [], ids, use_cache=False)
    handle.remove()
    other.remove()
    expected = 1 - F.cosine_similarity(streams[0], streams[0] + added[0], dim=-1).mean()
    assert float(turned[2]) == pytest.approx(float(expected), rel=1e-5)


def test_a_layer_with_two_mixers_has_one_score() -> None:
    model = causal(tiny.two_mixers, tiny.plain)
    traced = TracedModel(model)
    found = attention_scores(traced, BATCHES, "kl")
    assert found.layers == (0, 1)
    intact = [logits_without(model, [], ids) for ids in BATCHES]
    without = [logits_without(model, [model.layers[0].mix], ids) for ids in BATCHES]
    parts = [divergences(one, other).flatten() for one, other in zip(intact, without, strict=True)]
    assert float(found[0]) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
    assert 0 < float(attention_scores(traced, BATCHES, "cosine")[0]) < 2


def test_half_precision_sums_in_float32() -> None:
    model = model_of().bfloat16().double()  # so that both have the same weights
    exact, half = (attention_scores(made, BATCHES[:1], "cosine") for made in (model, copy.deepcopy(model).bfloat16()))
    for layer in range(4):
        assert float(half[layer]) == pytest.approx(float(exact[layer]), rel=0.05)
    values = [float(half[layer]) for layer in range(4)]
    assert any(value != float(torch.tensor(value).bfloat16()) for value in values)


def test_only_some_layers_may_be_scored() -> None:
    _, traced = shared()
    all_of_them, some = (
        attention_scores(traced, BATCHES, "loss"),
        attention_scores(traced, BATCHES, "loss", layers=[2, 0]),
    )
    assert some.layers == (0, 2) and some.scores == (all_of_them[0], all_of_them[2])
    with pytest.raises(KeyError, match=r"layer 1 was not scored; \[0, 2\] were"):
        some[1]


# --- greedy dropping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cosine", "loss", "kl"])
def test_greedy_dropping_takes_the_cheapest_of_what_is_left(method: Any) -> None:
    model, traced = shared()
    found = attention_scores(traced, BATCHES, method, greedy=True)
    dropped: list[int] = []
    for step in found.steps:
        left = [layer for layer in range(4) if layer not in dropped]
        values = {layer: greedy_value(model, method, dropped, layer) for layer in left}
        assert step.layer == min(values, key=values.__getitem__)
        dropped.append(step.layer)
        loss, kl = expected_costs(model, dropped)
        assert float(step.cost) == pytest.approx(kl if method == "kl" else loss, rel=1e-4)
        score = values[step.layer] - (expected_costs(model, dropped[:-1])[0] if method == "loss" else 0.0)
        assert float(step.score) == pytest.approx(score, rel=1e-3, abs=1e-7)
    assert sorted(found.order) == [0, 1, 2, 3] and len(found.curve) == 4
    assert found.scores == attention_scores(traced, BATCHES, method).scores


def greedy_value(model: Causal, method: str, dropped: list[int], layer: int) -> float:
    if method == "cosine":
        turns = [expected_turns(model, ids, dropped)[layer].flatten() for ids in BATCHES]
        return float(torch.cat(turns).mean())
    return expected_costs(model, [*dropped, layer])[("loss", "kl").index(method)]


def test_greedy_dropping_can_stop_early() -> None:
    _, model = shared()
    whole, two = (attention_scores(model, BATCHES, "kl", greedy=True, drop=drop) for drop in (None, 2))
    assert two.steps == whole.steps[:2] and two.scores == whole.scores
    some = attention_scores(model, BATCHES, "kl", greedy=True, layers=[1, 3])
    assert sorted(some.order) == [1, 3]


# --- cache --------------------------------------------------------------------------------------------


class Counter:
    """How many runs of a graph were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        from fxfusion.models.traced import TracedGraph

        original = TracedGraph.run
        self.count = 0

        def run(graph: TracedGraph, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if stop_after is not None and self.count > stop_after:
                raise KeyboardInterrupt
            return original(graph, *args, **kwargs)

        monkeypatch.setattr(TracedGraph, "run", run)


@pytest.mark.parametrize(("method", "runs"), [("cosine", 2), ("loss", 2 * 5), ("kl", 2 * 5)])
def test_a_cache_makes_a_second_call_free(method: Any, runs: int, tmp_path: Path) -> None:
    (_, model), file = shared(), tmp_path / "deep" / "scores.json"
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        first = attention_scores(model, BATCHES, method, cache=file)
        assert counter.count == runs
        again = attention_scores(model, BATCHES, method, cache=file)
        assert counter.count == runs
    assert again == first == attention_scores(model, BATCHES, method)


@pytest.mark.parametrize("method", ["cosine", "loss", "kl"])
def test_an_interrupted_measurement_goes_on_to_the_same_numbers(method: Any, tmp_path: Path) -> None:
    (_, model), file = shared(), tmp_path / "scores.json"
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        whole = attention_scores(model, BATCHES, method, greedy=True)
        needed = counter.count
    half = needed // 2
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, stop_after=half)
        with pytest.raises(KeyboardInterrupt):
            attention_scores(model, BATCHES, method, greedy=True, cache=file)
    assert json.loads(file.read_text())["values"]
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        assert attention_scores(model, BATCHES, method, greedy=True, cache=file) == whole
        assert counter.count <= needed - half + 2  # and the runs that the interrupted one started from


def test_methods_batches_and_layers_share_a_cache(tmp_path: Path) -> None:
    (_, model), file = shared(), tmp_path / "scores.json"
    attention_scores(model, BATCHES, "loss", layers=[1], cache=file)
    attention_scores(model, BATCHES, "kl", layers=[1], cache=file)
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        found = attention_scores(model, BATCHES, "loss", cache=file)
        assert counter.count == 2 * (1 + 3)
    assert found == attention_scores(model, BATCHES, "loss")
    longer = [*BATCHES, token_ids(1, 5, seed=7)]
    assert attention_scores(model, longer, "loss", cache=file) == attention_scores(model, longer, "loss")
    assert attention_scores(model, BATCHES, "loss", cache=file) == found
    assert attention_scores(model, longer, "loss", cache=file).sequences == 6


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    model, file = model_of(2), tmp_path / "scores.json"
    traced = TracedModel(model)
    attention_scores(traced, BATCHES, cache=file)
    before = file.read_bytes()
    with torch.no_grad():
        model.layers[0].mix.qkv.weight[0, 0] += 1e-9
    with pytest.raises(OptionError, match="holds another measurement .model is"):
        attention_scores(traced, BATCHES, cache=file)
    assert file.read_bytes() == before


# --- forms of the result, bad input -------------------------------------------------------------------


def test_to_dict_is_plain_json() -> None:
    found = attention_scores(shared(2)[1], [token_ids(1, 6)], "loss", greedy=True)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["method"] == "loss" and data["ranking"] == list(found.ranking)
    assert [score["layer"] for score in data["scores"]] == [0, 1]
    assert data["scores"][0]["value"] == float(found[0]) and data["scores"][0]["low"] is None
    assert [step["layer"] for step in data["steps"]] == list(found.order)
    assert data["steps"][1]["cost"]["value"] == float(found.curve[1])


def test_progress_goes_to_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    _, model = shared(2)
    attention_scores(model, BATCHES, "kl")
    assert capsys.readouterr() == ("", "")
    for method, total in (("kl", 2 * (2 + 1)), ("cosine", 2 * 3)):
        attention_scores(model, BATCHES, method, greedy=True, progress=True)  # type: ignore[arg-type]
        shown = capsys.readouterr()
        assert shown.out == "" and f"attention scores ({method})" in shown.err and f"{total}/{total}" in shown.err


def scored(**options: Any) -> AttentionScores:
    model = options.pop("model", None) or shared(2)[1]
    return attention_scores(model, options.pop("batches", BATCHES), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "guess"}, OptionError, "method must be one of cosine, loss, kl, got 'guess'"),
        ({"layers": [0, 5]}, OptionError, r"no attention to score in layers \[5\]; it is in layers \[0, 1\]"),
        ({"layers": []}, OptionError, "no attention to score in layers"),
        ({"drop": 1}, OptionError, "needs greedy=True"),
        ({"drop": 3, "greedy": True}, OptionError, "drop must lie between 1 and 2"),
        ({"drop": 0, "greedy": True}, OptionError, "drop must lie between 1 and 2"),
    ],
    ids=str,
)
def test_bad_options_are_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scored(**options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: causal(tiny.ffn_only, tiny.ffn_only), ValueError, "no attention left to score"),
        (lambda: causal(tiny.breaking), CaptureError, "must be captured as one graph"),
        (lambda: causal(tiny.plain).to("meta"), ValueError, "meta device"),
        (lambda: causal(tiny.scaled_parallel), OptionError, 'scaled together with the FFN.*method="loss" or "kl"'),
    ],
)
def test_models_that_cannot_be_scored_are_errors(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scored(model=make(), method="cosine")


def test_a_scaled_parallel_attention_can_be_scored_by_what_it_does() -> None:
    model = causal(tiny.scaled_parallel, tiny.plain)
    found = attention_scores(model, BATCHES[:1], "kl")
    assert float(found[0]) == pytest.approx(expected_costs(model, [0], BATCHES[:1])[1], rel=1e-5)


@pytest.mark.parametrize(("method", "words"), [("cosine", r"the stream at layers\.1\.mix"), ("loss", "the loss")])
def test_values_that_are_not_finite_name_block_and_batch(method: Any, words: str) -> None:
    model = model_of(2)
    traced = TracedModel(model)
    batches = [token_ids(2, 6) % 7, token_ids(2, 6) * 0 + 7]
    attention_scores(traced, batches, method)
    with torch.no_grad():
        model.embed.weight[7] = math.nan
    words = words.replace("1", "0")
    with pytest.raises(ValueError, match=f"{words}.* is not finite in batch 1"):
        attention_scores(traced, batches, method)


def test_an_attention_without_which_the_model_fails_is_named() -> None:
    def fragile(layer: tiny.Layer, x: Tensor) -> Tensor:
        return x + layer.mix(x) + torch.log(x[..., :1]) * layer.gate(x)

    model = causal(tiny.attention_only, fragile)
    with torch.no_grad():
        model.embed.weight[:, 0] = -1e-3
        first = model.layers[0].mix
        first.norm.weight.fill_(1.0)
        first.out.weight[0] = 0.0
        first.out.bias = nn.Parameter(torch.zeros(tiny.HIDDEN, dtype=torch.float64))
        first.out.bias[0] = 3.0
    with pytest.raises(
        ValueError, match=r"the KL divergence without the attention of layers \[0\] is not finite in batch 0"
    ):
        attention_scores(model, BATCHES, "kl")
