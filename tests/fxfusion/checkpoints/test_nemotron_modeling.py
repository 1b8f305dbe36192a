"""The decoder that lies in nemotron-nas folders, as a model of transformers."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from tests.fxfusion.checkpoints.nemotron_models import ids, logits, off, randomised, settings
from tests.fxfusion.checkpoints.test_nemotron_configuration import block

# Attention and FFN, FFN alone, padding, FFN alone and wide, attention alone, and both again.
BLOCKS = [block(2, 6.0), block(None, 12.0), block(None, None), block(None, 18.0), block(2, None), block(2, 6.0)]


def mixed(blocks: list[dict[str, Any]] | None = None, **others: Any) -> DeciLMForCausalLM:
    chosen = BLOCKS if blocks is None else blocks
    config = DeciLMConfig(**settings(num_hidden_layers=len(chosen), block_configs=chosen, **others))
    found: DeciLMForCausalLM = randomised(DeciLMForCausalLM(config))
    return found


def test_layers_hold_what_they_use() -> None:
    layers = mixed().model.layers
    assert [sorted(name for name, _ in layer.named_children()) for layer in layers] == [
        ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"],
        ["mlp", "post_attention_layernorm"],
        [],
        ["mlp", "post_attention_layernorm"],
        ["input_layernorm", "self_attn"],
        ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"],
    ]
    assert [layer.self_attn.layer_idx for layer in layers if hasattr(layer, "self_attn")] == [0, 1, 2]
    assert layers[3].mlp.gate_proj.weight.shape == (768, 64)


def test_with_all_layers_alike_it_is_the_stock_decoder() -> None:
    ours = mixed([block(2, 6.0)] * 3)
    stock = LlamaForCausalLM(LlamaConfig(**settings(num_hidden_layers=3))).eval()
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(logits(ours), logits(stock))


def test_padding_changes_nothing() -> None:
    padded, plain = mixed(), mixed([one for one in BLOCKS if one != BLOCKS[2]])
    names = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate((0, 1, 3, 4, 5))}
    state = padded.state_dict()
    for name in plain.state_dict():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        plain.get_parameter(name).data.copy_(state[name.replace(prefix, names.get(prefix, ""), 1)])
    assert torch.equal(logits(padded), logits(plain))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "config", "static"])
def test_cached_decoding_is_the_full_computation(attention: str, kind: str) -> None:
    model = mixed()
    model.set_attn_implementation(attention)
    tokens = ids()
    cache = {
        "dynamic": lambda: DynamicCache(),
        "config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[kind]()
    with torch.no_grad():
        parts = (tokens[:, :4], *tokens[:, 4:].split(1, dim=1))
        decoded = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)
        wrong = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
    assert off(decoded, logits(model)) < 1e-4
    assert off(wrong, logits(model)) > 1e-2, "without a cache the parts are other texts"
    assert cache.get_seq_length() == tokens.shape[1]
    storing = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len(storing) == 3


def test_the_implementations_of_attention_agree() -> None:
    model = mixed()
    sdpa = logits(model)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert off(logits(model), sdpa) < 1e-5


def test_heads_in_groups_of_another_size_in_each_layer() -> None:
    model = mixed([block(1, 6.0), block(4, 6.0), block(2, 6.0)])
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [64, 16, 32]
    tokens, cache = ids(), StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        parts = (tokens[:, :4], *tokens[:, 4:].split(1, dim=1))
        decoded = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)
    assert off(decoded, logits(model)) < 1e-4


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_it_generates(how: dict[str, Any]) -> None:
    model, tokens = mixed(), ids(5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    got = model.generate(tokens, **options)
    slow = model.generate(tokens, **{**options, "use_cache": False, "cache_implementation": None})
    assert got.shape == (2, 11) and torch.equal(got, slow)


def test_padded_batches() -> None:
    model, tokens = mixed(), ids()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert off(got, logits(model)) < 1e-4


def test_hidden_states_and_attentions_are_recorded() -> None:
    model = mixed()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids(), output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 7 and len(found.attentions) == 3
    assert torch.equal(found.hidden_states[2], found.hidden_states[3]), "padding"
    assert not torch.equal(found.hidden_states[1], found.hidden_states[2])


def test_gradients_with_and_without_checkpointing() -> None:
    plain, saving = mixed().train(), mixed().train()
    saving.activation_checkpointing_enable()
    calls = []
    saving.model.layers[3].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(ids(), labels=ids()).loss.backward()
    assert len(calls) == 2, "computed again in the backward pass"
    for name, value in plain.named_parameters():
        other = saving.get_parameter(name).grad
        assert value.grad is not None and other is not None and value.grad.abs().sum() > 0
        assert off(other, value.grad) < 1e-5


def test_the_tensor_parallel_plan_names_every_projection() -> None:
    model = mixed()
    plan = model._tp_plan
    matched = {
        name: [rule for rule in plan if fnmatch.fnmatch(name, rule)]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert all(len(rules) == 1 for rules in matched.values()) and len(matched) == 4 * 3 + 3 * 4 + 1
    kinds = {name.rpartition(".")[2]: plan[rules[0]] for name, rules in matched.items()}
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "colwise")
    assert kinds == {**columns, "o_proj": "rowwise", "down_proj": "rowwise", "lm_head": "colwise_gather_output"}


def test_it_is_captured_as_one_graph() -> None:
    from fxfusion.compiler.capture import capture_model

    found, _ = capture_model(mixed(), (ids(),), {"use_cache": False})
    assert len(found) == 1
