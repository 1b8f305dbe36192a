"""drop_attention: the attention is gone, the rest is as before, and every cache is right."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import fxfusion
from fxfusion.errors import SurgeryError
from fxfusion.models import attention_surgery
from fxfusion.models.drop_attention import drop_attention
from fxfusion.models.no_attention import NoAttention, NoNorm, Nothing
from fxfusion.models.surgery_proof import CacheProof, Proof
from tests.end_to_end.caching import (
    LIMIT,
    RED,
    decoded,
    decoder,
    new_cache,
    off,
    recomputed,
    stubbed,
    token_ids,
)
from tests.end_to_end.families import hide_names
from tests.end_to_end.family_table import family_named
from tests.fxfusion.models.odd_decoder import odd_decoder

LLAMA, GPT2 = family_named("llama"), family_named("gpt2")


@lru_cache
def _llama() -> Any:
    return decoder(LLAMA)


def llama() -> Any:
    """A random Llama of four layers; a copy of its own for each test."""
    return copy.deepcopy(_llama())


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that surgery could touch."""
    return {
        "modules": {name: module for name, module in model.named_modules()},
        "attributes": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str))}
            for name, module in model.named_modules()
        },
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "gradients": {name: value.requires_grad for name, value in model.named_parameters()},
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()) if hasattr(model, "generation_config") else {},
    }


def slots(model: Any) -> list[int | None]:
    """The cache slot of each layer's attention, None where it has none."""
    attentions = [layer.self_attn for layer in model.model.layers] if hasattr(model, "model") else odd_mixers(model)
    return [None if isinstance(found, NoAttention) else found.layer_idx for found in attentions]


def odd_mixers(model: Any) -> list[nn.Module]:
    return [block.mix for block in model.blocks]


# --- what is gone, what stays -------------------------------------------------------------------------


def test_attention_and_its_norm_are_gone_and_all_else_is_the_same() -> None:
    model = llama()
    before, parameters = state(model), dict(model.named_parameters())
    assert fxfusion.drop_attention(model, [2, 0]) is model
    for number, layer in enumerate(model.model.layers):
        assert (
            isinstance(layer.self_attn, NoAttention) == isinstance(layer.input_layernorm, NoNorm) == (number in (0, 2))
        )
    gone = [name for name in parameters if name.startswith(("model.layers.0.", "model.layers.2."))]
    gone = [name for name in gone if "self_attn" in name or "input_layernorm" in name]
    after = dict(model.named_parameters())
    assert len(gone) == 10 and after.keys() == parameters.keys() - gone == model.state_dict().keys()
    assert all(after[name] is parameters[name] for name in after)
    assert slots(model) == [None, 0, None, 1]
    stub = model.model.layers[2].self_attn
    assert (stub.layer_idx, stub.is_causal, stub.head_dim) == (2, True, 8)
    now = state(model)
    assert now["hooks"] == [0] * len(now["hooks"])
    changed = {key: value for key, value in now["config"].items() if value != before["config"].get(key)}
    assert changed == {
        "kv_sharing_modes": [None, None, "reuse", "reuse"],
        "fxfusion": {"dropped_attention": [0, 2], "cache_slots": [None, 0, None, 1], "layer_types": None},
    }
    assert json.loads(json.dumps(changed)) == changed
    assert now["generation"] == before["generation"]


def test_the_record_is_saved_with_the_config(tmp_path: Any) -> None:
    model = drop_attention(llama(), [1])
    model.config.save_pretrained(tmp_path)
    loaded = LlamaConfig.from_pretrained(tmp_path)
    assert loaded.fxfusion == model.config.fxfusion and loaded.kv_sharing_modes == model.config.kv_sharing_modes


def test_the_attention_is_freed() -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    held = [weakref.ref(value) for value in (attention, *attention.parameters())]
    del attention
    drop_attention(model, [1])
    gc.collect()
    assert all(ref() is None for ref in held)


def test_modes_gradients_and_tied_weights_stay() -> None:
    model = decoder(GPT2).to(torch.bfloat16).train()
    model.transformer.h[3].eval()
    model.transformer.wte.weight.requires_grad_(False)
    assert model.lm_head.weight is model.transformer.wte.weight
    before = {name: module.training for name, module in model.named_modules()}
    drop_attention(model, [1])
    assert isinstance(model.transformer.h[1].attn, NoAttention) and model.transformer.h[1].ln_1.training
    assert {name: module.training for name, module in model.named_modules()}.items() <= before.items()
    assert model.lm_head.weight is model.transformer.wte.weight and not model.lm_head.weight.requires_grad
    assert model.transformer.h[1].mlp.c_fc.weight.requires_grad
    model(input_ids=token_ids()).logits.float().sum().backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad is not None


def test_on_the_meta_device() -> None:
    model = llama().to("meta")
    drop_attention(model, [0, 1])
    real = drop_attention(llama(), [0, 1])
    assert slots(model) == slots(real) == [None, None, 0, 1]
    assert model.config.to_dict() == real.config.to_dict()
    assert model.state_dict().keys() == real.state_dict().keys()
    assert all(value.is_meta for value in model.parameters())
    model.load_state_dict(real.state_dict(), assign=True)
    model.model.rotary_emb = real.model.rotary_emb
    assert torch.equal(recomputed(model, token_ids()), recomputed(real, token_ids()))


def test_without_a_check_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a proof by numbers was made")

    monkeypatch.setattr(Proof, "of_intact", refuse)
    model = drop_attention(odd_decoder(), [0], check=False)
    assert slots(model) == [None, 0, 1, 2] and odd_decoder_is_right(model)


def test_a_compiled_model_is_dropped_from_and_compiles_anew() -> None:
    torch._dynamo.reset()
    model = llama()
    compiled = torch.compile(model, backend="eager")
    ids = token_ids()
    before = recomputed(compiled, ids)
    assert drop_attention(compiled, [1]) is compiled
    after = recomputed(compiled, ids)
    assert off(after, recomputed(stubbed(_llama(), LLAMA, [1]), ids)) < LIMIT < RED < off(after, before)
    torch._dynamo.reset()


@pytest.mark.slow
def test_names_of_classes_do_not_matter() -> None:
    model = drop_attention(hide_names(_llama()), [1])
    assert off(recomputed(model, token_ids()), recomputed(stubbed(_llama(), LLAMA, [1]), token_ids())) < LIMIT


# --- several calls, all layers ------------------------------------------------------------------------


def test_calls_add_up_and_their_order_does_not_matter() -> None:
    config = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
    family, ids = family_named("qwen2"), token_ids()
    intact = decoder(family, **config, use_sliding_window=True)
    assert intact.config.layer_types == config["layer_types"]
    together = drop_attention(copy.deepcopy(intact), [0, 2])
    one_by_one = drop_attention(drop_attention(copy.deepcopy(intact), [2]), [0])
    assert together.config.to_dict() == one_by_one.config.to_dict()
    assert slots(together) == slots(one_by_one) == [None, 0, None, 1]
    assert together.config.fxfusion["layer_types"] == config["layer_types"]
    reference = recomputed(stubbed(intact, family, [0, 2]), ids)
    for kind in ("dynamic", "static"):
        assert off(decoded(one_by_one, ids, new_cache(kind, one_by_one)), reference) < LIMIT


def test_no_attention_at_all_warns_and_generates() -> None:
    model, ids = llama(), token_ids()
    with pytest.warns(UserWarning, match="no layer has attention any more"):
        drop_attention(model, range(4))
    assert model.config.use_cache
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    for given in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, **given)
        assert torch.equal(found, expected)
    assert off(decoded(model, ids, new_cache("dynamic", model)), recomputed(model, ids)) < LIMIT


def test_positions_that_are_counted_in_the_cache_are_not_read_from_an_empty_one() -> None:
    model, ids = decoder(GPT2), token_ids()
    with pytest.warns(UserWarning, match="no layer has attention any more"):
        drop_attention(model, range(4))
    assert not model.config.use_cache and not model.generation_config.use_cache
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False), expected)
    with pytest.raises(ValueError, match="get_seq_length"):
        decoded(model, ids, new_cache("dynamic", model))


# --- the cache ----------------------------------------------------------------------------------------


def test_the_cache_comparison_goes_red_where_slots_are_not_renumbered() -> None:
    model, ids = drop_attention(llama(), [0]), token_ids()
    reference = recomputed(stubbed(_llama(), LLAMA, [0]), ids)
    assert off(decoded(model, ids, new_cache("bare", model)), reference) < LIMIT
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    assert off(decoded(model, ids, new_cache("bare", model)), reference) > RED
    with pytest.raises(NotImplementedError, match="cannot be updated"):
        decoded(model, ids, new_cache("dynamic", model))
    del model.config.kv_sharing_modes
    for kind in ("dynamic", "static"):
        assert off(decoded(model, ids, new_cache(kind, model)), reference) > RED


def test_the_cache_comparison_goes_red_where_types_do_not_follow() -> None:
    config = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
    family, ids = family_named("qwen2"), token_ids()
    intact = decoder(family, **config, use_sliding_window=True)
    model = drop_attention(copy.deepcopy(intact), [0])
    assert slots(model) == [None, 1, 2, 0]
    reference = recomputed(stubbed(intact, family, [0]), ids)
    assert off(decoded(model, ids, new_cache("dynamic", model)), reference) < LIMIT
    model.config.layer_types = config["layer_types"]
    with pytest.raises(RuntimeError):
        decoded(model, ids, new_cache("static", model), prefill=3)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layer was named"),
        ([-1], "-1 is no layer number"),
        ([True], "True is no layer number"),
        ([1.0], "1.0 is no layer number"),
        (["1"], "'1' is no layer number"),
        ([1, 2, 1], "layer 1 is named twice"),
        ("12", "must be a list of layer numbers"),
        (3, "must be a list of layer numbers"),
        ([4], "there is no layer 4: blocks has 4"),
    ],
)
def test_bad_layers(layers: Any, message: str) -> None:
    model = odd_decoder()
    before = state(model)
    with pytest.raises(SurgeryError, match=message):
        drop_attention(model, layers)
    assert state(model) == before


def test_numbers_of_other_types_are_numbers() -> None:
    model = drop_attention(odd_decoder(), (number for number in torch.tensor([1, 2])))
    assert model.config.fxfusion["dropped_attention"] == [1, 2]


def test_twice_and_stale_records() -> None:
    model = drop_attention(odd_decoder(), [1])
    before = state(model)
    with pytest.raises(SurgeryError, match="layer 1 has lost its attention already"):
        drop_attention(model, [0, 1])
    assert state(model) == before
    other = odd_decoder()
    other.config.fxfusion = model.config.fxfusion
    with pytest.raises(SurgeryError, match="layer 1 lost its attention, but the model has one there"):
        drop_attention(other, [0])
    del other.config.fxfusion["cache_slots"]
    with pytest.raises(SurgeryError, match="without cache_slots; was it edited"):
        drop_attention(other, [0])


SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize("check", [True, False])
def test_an_encoder_is_refused(check: bool) -> None:
    model = BertLMHeadModel(BertConfig(**SMALL)).eval()
    with pytest.raises(SurgeryError, match="the model is not causal"):
        drop_attention(model, [0], check=check)


def test_other_models_are_refused() -> None:
    seq2seq = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    )
    with pytest.raises(SurgeryError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        drop_attention(seq2seq, [0])
    for model in (nn.Linear(2, 2), 3):
        with pytest.raises(SurgeryError, match="is no transformers model"):
            drop_attention(model, [0])  # type: ignore[type-var]


def test_a_model_that_is_not_one_graph_is_refused() -> None:
    class Broken(type(odd_decoder())):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool | None = None) -> Any:
            output = super().forward(input_ids, past_key_values, use_cache)
            torch._dynamo.graph_break()
            output.logits = output.logits * 2
            return output

    with pytest.raises(SurgeryError, match="Broken cannot be looked into: .* one graph"):
        drop_attention(Broken(odd_decoder().config), [0])


# --- structures that cannot be handled are errors, and leave the model alone --------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "inline"}, "is no module of its own"),
        ({"form": "shared"}, "other parts of the model read"),
        ({"form": "named"}, "returns a dict"),
        ({"form": "forgetful"}, "cached decoding of the unchanged model is off"),
        ({"index": "place"}, "how the attention finds its slot of the key-value cache cannot be told"),
        ({"offset": 1}, "how the attention finds its slot of the key-value cache cannot be told"),
        ({"num_kv_shared_layers": 1}, "use the keys and values of others"),
    ],
)
def test_odd_structures_are_refused(settings: dict[str, Any], message: str) -> None:
    model = odd_decoder(**settings)
    before = state(model)
    with pytest.raises(SurgeryError, match=message):
        drop_attention(model, [1])
    assert state(model) == before


def test_the_same_model_without_oddities_is_not() -> None:
    model = drop_attention(odd_decoder(index="number_of_layer"), [0, 3])
    assert [getattr(block.mix, "number_of_layer", None) for block in model.blocks][1:3] == [0, 1]
    assert odd_decoder_is_right(model)


def odd_decoder_is_right(model: Any) -> bool:
    ids = token_ids()
    return off(decoded(model, ids, new_cache("dynamic", model)), recomputed(model, ids)) < LIMIT


def test_a_model_without_a_cache_can_lose_attention_too() -> None:
    model = odd_decoder(index="place")
    del model.config.use_cache
    drop_attention(model, [0])
    assert isinstance(model.blocks[0].mix, NoAttention)


@pytest.mark.parametrize(("proof", "step"), [(Proof, "check_logits"), (CacheProof, "check")])
def test_after_a_failed_proof_the_model_is_as_it_was(proof: type, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, model: nn.Module) -> None:
        assert any(isinstance(module, NoAttention) for module in model.modules()), "nothing was changed yet"
        assert slots(model) == [None, 0, 1, 2], "nothing was renumbered yet"
        raise SurgeryError("a failure on purpose")

    model = odd_decoder()
    before = state(model)
    monkeypatch.setattr(proof, step, fail)
    with pytest.raises(SurgeryError, match="blocks.0.mix .*a failure on purpose|a failure on purpose.*found"):
        drop_attention(model, [0])
    assert state(model) == before


def test_a_stand_in_that_is_not_right_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that adds the stream once more is offered: by numbers or by graph, it is refused."""
    monkeypatch.setattr(attention_surgery, "candidates", lambda returned: [Nothing("argument", 0)])
    for check in (True, False):
        model = odd_decoder()
        before = state(model)
        with pytest.raises(SurgeryError, match=r"blocks.1.mix \(OddAttention\).*tried argument 0"):
            drop_attention(model, [1], check=check)
        assert state(model) == before


def test_an_interrupt_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: CacheProof, model: nn.Module) -> None:
        raise KeyboardInterrupt

    model = odd_decoder()
    before = state(model)
    monkeypatch.setattr(CacheProof, "check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        drop_attention(model, [0])
    assert state(model) == before


def test_a_partial_drop_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drop_attention(odd_decoder(), [0])


def test_a_config_of_another_kind_is_no_record() -> None:
    model = odd_decoder()
    model.config.fxfusion = {"note": 1}
    drop_attention(model, [2])
    assert model.config.fxfusion["note"] == 1 and model.config.fxfusion["dropped_attention"] == [2]
    assert isinstance(model.config, PreTrainedConfig)
