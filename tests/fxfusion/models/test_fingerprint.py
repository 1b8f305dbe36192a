"""Facts of a model: found by structure, the same after surgery, different for another model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fxfusion import FusionPlan
from fxfusion.errors import PlanError
from fxfusion.models.fingerprint import check_fits, decoder_layers, facts_of, tensors_digest
from fxfusion.plan.fusion_plan import ModelFacts
from tests.blocks import Attention, Block, Gated, Rms, Stack, randomise, stack

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def decoder(seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny causal language model with sliding and full attention, and a config that lists both."""
    torch.manual_seed(seed)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Qwen2Config(
        **SMALL | {"layer_types": kinds, "sliding_window": 4, "use_sliding_window": True} | changes
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def without_attention(model: nn.Module, layers: list[int]) -> nn.Module:
    """A copy with what dropping attention takes away: modules, parameters, entries of the config."""
    model = copy.deepcopy(model)
    for number in layers:
        layer = model.model.layers[number]
        del layer.self_attn, layer.input_layernorm
    model.config.layer_types = ["none" if at in layers else kind for at, kind in enumerate(model.config.layer_types)]
    return model


def with_wide_ffn(model: nn.Module, group: list[int], width: int = 72) -> nn.Module:
    """A copy where one layer's FFN is wider and the others' are gone, as after fusing."""
    model = copy.deepcopy(model)
    *others, last = (model.model.layers[number] for number in group)
    for layer in others:
        del layer.mlp, layer.post_attention_layernorm
    last.mlp.gate_proj, last.mlp.up_proj = nn.Linear(16, width, False), nn.Linear(16, width, False)
    last.mlp.down_proj = nn.Linear(width, 16, False)
    return model


def in_bfloat16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.deepcopy,
    "some attention dropped": lambda model: without_attention(model, [1, 2]),
    "all attention dropped": lambda model: without_attention(model, [0, 1, 2, 3]),
    "dropped and fused": lambda model: with_wide_ffn(without_attention(model, [1, 2, 3]), [1, 2, 3]),
    "all dropped and fused": lambda model: with_wide_ffn(without_attention(model, [0, 1, 2, 3]), [0, 1, 2, 3]),
    "bfloat16": in_bfloat16,
    "compiled": torch.compile,
}
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "fewer layers": ({"num_hidden_layers": 2, "layer_types": None}, "layers"),
    "wider": ({"hidden_size": 32, "head_dim": 16}, "hidden"),
    "more tokens": ({"vocab_size": 65}, "vocabulary"),
    "more heads": ({"num_attention_heads": 4, "head_dim": 4}, "fingerprint"),
    "tied head": ({"tie_word_embeddings": True}, "fingerprint"),
}


def test_what_is_found_in_a_language_model() -> None:
    facts = facts_of(decoder())
    assert (facts.architecture, facts.layers, facts.hidden, facts.vocabulary) == ("Qwen2ForCausalLM", 4, 16, 64)
    assert facts.fingerprint is not None and facts.weights is not None
    assert len(facts.fingerprint) == len(facts.weights) == 16


@pytest.mark.parametrize("change", SAME)
def test_facts_survive_surgery(change: str) -> None:
    model = decoder()
    facts, plan = facts_of(model), FusionPlan(groups=[[1, 2, 3]], model=facts_of(model))
    changed = SAME[change](model)
    assert facts_of(changed).model_copy(update={"tensors": None}) == facts.model_copy(update={"tensors": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(plan, changed)


@pytest.mark.parametrize("change", OTHER)
def test_another_model_has_other_facts(change: str) -> None:
    changes, field = OTHER[change]
    facts, other = facts_of(decoder()), decoder(**changes)
    assert getattr(facts_of(other), field) != getattr(facts, field)
    with pytest.raises(PlanError, match=f"plan: made for another model: .*model.{field} is "):
        check_fits(FusionPlan(model=facts), other)


def test_the_message_says_both_sides() -> None:
    plan = FusionPlan(model=facts_of(decoder()))
    with pytest.raises(PlanError, match="model.vocabulary is 64, this model's is 65; model.fingerprint is "):
        check_fits(plan, decoder(vocab_size=65))
    with pytest.raises(PlanError, match=r"parameters outside the layers, or num_attention_heads or head_dim, differ"):
        check_fits(plan, decoder(num_attention_heads=4, head_dim=4))
    with pytest.raises(PlanError, match="model.architecture is Qwen2ForCausalLM, this model's is Stack"):
        check_fits(plan, stack())


def test_other_weights_only_warn() -> None:
    plan = FusionPlan(model=facts_of(decoder()))
    with pytest.warns(UserWarning, match="model.weights differs"):
        check_fits(plan, decoder(seed=1))
    assert plan.model is not None
    unknown = plan.replace(model=plan.model.model_copy(update={"weights": None, "tensors": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(unknown, decoder(seed=1))


def test_every_column_of_an_embedding_counts() -> None:
    """Values are sampled, and a step of the row's length would look at one column only."""
    model = decoder(vocab_size=4096)
    facts = facts_of(model)
    for column in range(16):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.model.embed_tokens.weight[:, column] *= 2
        assert facts_of(changed).weights != facts.weights, column


def one_bit(value: Tensor, place: int) -> None:
    with torch.no_grad():
        value.view(-1).view(torch.int32)[place] ^= 1


@pytest.mark.parametrize("place", [0, 77, 255])
@pytest.mark.parametrize("name", ["layers.1.self_attn.o_proj.weight", "layers.3.mlp.down_proj.weight", "norm.weight"])
def test_one_bit_of_any_tensor_tells_models_apart(name: str, place: int) -> None:
    """Two trainings of one model differ in their layers, maybe only below the rounding of a sum."""
    model, other = decoder(), decoder()
    value = other.model.get_parameter(name)
    one_bit(value, place % value.numel())
    assert facts_of(other) != facts_of(model)
    assert facts_of(decoder()) == facts_of(model)


def test_buffers_and_what_sums_do_not_show_tell_models_apart() -> None:
    model, buffer, swapped = decoder(), decoder(), decoder()
    one_bit(buffer.get_buffer("model.rotary_emb.inv_freq"), 1)
    with torch.no_grad():
        weight = swapped.model.layers[1].mlp.down_proj.weight
        weight[[0, 1]] = weight[[1, 0]]
    assert len({facts_of(each).tensors for each in (model, buffer, swapped)}) == 3


def test_pieces_of_a_large_tensor_are_hashed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensors_digest(decoder())
    monkeypatch.setattr("fxfusion.models.fingerprint._CHUNK", 5)
    assert tensors_digest(decoder()) == whole


def test_a_plan_of_other_layers_warns_in_the_same_precision_only() -> None:
    plan, other = FusionPlan(model=facts_of(decoder())), decoder()
    one_bit(other.model.layers[2].mlp.up_proj.weight, 3)
    with pytest.warns(UserWarning, match="was made with other weights"):
        check_fits(plan, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(plan, other.bfloat16())


def test_a_refit_gives_layers_other_weights_and_nothing_outside() -> None:
    refit = {"reference": "intact", "later": "none", "tokens": 8, "held_out_tokens": 8, "fingerprint": "0" * 16}
    refit |= {"loss_before": 2.0, "loss_after": 1.0}
    plan, other = FusionPlan(model=facts_of(decoder()), refit=refit), decoder()
    one_bit(other.model.layers[2].mlp.up_proj.weight, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(plan, other)
    with pytest.warns(UserWarning, match="was made with other weights"):
        check_fits(plan.replace(refit=None), other)
    with pytest.warns(UserWarning, match="was made with other weights"):
        check_fits(plan, decoder(seed=1))


def test_the_meta_device_has_no_weights() -> None:
    with torch.device("meta"):
        model = decoder()
    facts, real = facts_of(model), facts_of(decoder())
    assert facts.weights is None and real.weights is not None
    assert facts == real.model_copy(update={"weights": None, "tensors": None})
    check_fits(FusionPlan(model=real), model)


def test_layers_that_the_model_lacks() -> None:
    model = stack(count=3)
    check_fits(FusionPlan(groups=[[1, 2]]), model)
    with pytest.raises(PlanError, match=r"plan: groups\[0\]\[1\]: layer 3 does not exist: the model has 3 layers"):
        check_fits(FusionPlan(groups=[[2, 3]]), model)


def test_what_a_hand_left_out_is_not_compared() -> None:
    plan = FusionPlan(model=ModelFacts(architecture="Stack", layers=3))
    check_fits(plan, stack(count=3))
    with pytest.raises(PlanError, match="model.layers is 3, this model's is 4"):
        check_fits(plan, stack(count=4))


# --- finding the layers -------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Two towers, experts inside the layers, and a list without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.ModuleList()
        self.vision = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.text = nn.ModuleDict({"layers": nn.ModuleList(self._layer() for _ in range(5))})
        self.embed = nn.Embedding(10, 6)

    def _layer(self) -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(6, 6) for _ in range(8))})


def test_layers_are_the_longest_outer_list() -> None:
    model = Wrapped()
    path, layers = decoder_layers(model)
    assert path == "text.layers" and layers is model.text["layers"]
    facts = facts_of(model)
    assert (facts.layers, facts.hidden, facts.vocabulary) == (5, 6, 10)


def test_a_config_decides_between_lists() -> None:
    model = Wrapped()
    model.config = transformers.PretrainedConfig(num_hidden_layers=3)
    assert decoder_layers(model)[0] == "vision"


def test_a_decoder_decides_between_towers() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2)
    config.num_decoder_layers = 2
    assert decoder_layers(transformers.T5ForConditionalGeneration(config))[0] == "decoder.block"


def test_a_model_without_layers() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ModuleList()):
        with pytest.raises(PlanError, match="has no decoder layers: no nn.ModuleList"):
            facts_of(model)


def test_a_list_that_is_the_model() -> None:
    assert decoder_layers(nn.ModuleList([nn.Linear(2, 3)]))[0] == ""
    one, other = (facts_of(nn.ModuleList(nn.Linear(2, 3) for _ in range(count))) for count in (1, 2))
    assert one.layers == 1 and one.weights is None and one.fingerprint != other.fingerprint


def test_sizes_of_plain_modules() -> None:
    assert facts_of(stack(hidden=8)).hidden == 8
    assert facts_of(stack(hidden=8, widths=[5, 6, 7])).hidden == 8
    mixed = Stack([Attention(8), Block(Rms(8), Gated(hidden=8, width=8 * 3))])
    assert facts_of(randomise(mixed)).hidden == 8
    assert facts_of(stack(hidden=8)).vocabulary is None
    with pytest.raises(PlanError, match="model.hidden is 8, this model's is 10"):
        check_fits(FusionPlan(model=facts_of(stack(hidden=8))), stack(hidden=10))
    ambiguous = Stack([nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)])
    assert facts_of(ambiguous).hidden is None
