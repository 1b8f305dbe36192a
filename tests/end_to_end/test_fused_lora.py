"""LoRA adapters through fusing: carried exactly, merged on request, trained, saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
from torch import Tensor

import fxfusion
from fxfusion.errors import SurgeryError
from fxfusion.models.fingerprint import facts_of
from tests.end_to_end.eager_parallel import llama, parallel_logits, phi3, randomised, relative, token_ids

LIMIT, RED = 1e-5, 1e-3
DROPPED, GROUP = [1, 2], [0, 1, 2]
FFN = ["gate_proj", "up_proj", "down_proj"]


def plan(norm: Literal["fold", "last"] = "fold") -> fxfusion.FusionPlan:
    return fxfusion.FusionPlan(dropped_attention=DROPPED, groups=[GROUP], norm=norm)


def adapted(model: Any, adapter: str = "default", **config: Any) -> Any:
    """The model with random adapters; by default on attention and FFNs, of unequal ranks and scalings."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": [*FFN, "q_proj"],
        "rank_pattern": {r"layers\.1\.mlp\..*": 2, r"layers\.2\.mlp\.down_proj": 7},
        "alpha_pattern": {r"layers\.2\.mlp\..*": 3},
        "task_type": "CAUSAL_LM",
    }
    made = peft.LoraConfig(**{**settings, **config})
    return randomised(peft.get_peft_model(model, made, adapter_name=adapter), seed=5, only="lora_")


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    found: Tensor = model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("norm", ["fold", "last"])
def test_adapters_are_carried_exactly(norm: Literal["fold", "last"]) -> None:
    model = adapted(llama())
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids(), norm)
    unlike = copy.deepcopy(model)
    randomised(unlike, seed=6, only="layers.1.mlp.up_proj.lora_B")
    other = parallel_logits(unlike, DROPPED, [GROUP], token_ids(), norm)
    with model.disable_adapter():
        without = parallel_logits(model, DROPPED, [GROUP], token_ids(), norm)

    assert fxfusion.fuse(model, plan(norm)) is model
    assert relative(logits(model), wanted) <= LIMIT < RED < relative(logits(model), other)
    with model.disable_adapter():
        assert relative(logits(model), without) <= LIMIT
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert (layer.r["default"], layer.in_features, layer.base_layer.in_features) == (4 + 2 + 7, 192, 192)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if "lora_" in name}
    assert {name.split(".")[4] for name in trained} == {"0", "1"}, "layer 3 is layer 1 now, others have no adapters"
    assert any("layers.1.self_attn.q_proj.lora_A" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"use_rslora": True}, {"lora_bias": True, "target_modules": ["gate_up_proj"]}])
def test_packed_gate_and_up_and_other_scalings(config: dict[str, Any]) -> None:
    biases = {"lora_bias": False, "target_modules": ["gate_up_proj", "down_proj"], **config}
    base = phi3()
    if biases["lora_bias"]:
        for layer in base.model.layers:  # PEFT warns where an adapter has a bias and its layer has none
            layer.mlp.gate_up_proj.register_parameter("bias", torch.nn.Parameter(torch.randn(128)))
    model = adapted(base, **biases)
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    fxfusion.fuse(model, plan())
    assert relative(logits(model), wanted) <= LIMIT


def test_only_some_members_have_adapters_and_some_have_two() -> None:
    model = adapted(llama(), target_modules=FFN, layers_to_transform=[1], rank_pattern={}, alpha_pattern={})
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["down_proj"], layers_to_transform=[2, 3]))
    randomised(model, seed=8, only=".second.")
    model.base_model.set_adapter(["default", "second"])
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    fxfusion.fuse(model, plan())
    assert relative(logits(model), wanted) <= LIMIT
    model.set_adapter("second")
    mlp = model.get_base_model().model.layers[0].mlp
    assert mlp.down_proj.r == {"default": 4, "second": 3} and mlp.gate_proj.r == {"default": 4}
    assert relative(logits(model), wanted) > RED
    assert model.peft_config["default"].layers_to_transform is None
    assert model.peft_config["default"].target_modules == {f"model.layers.0.mlp.{name}" for name in FFN}
    places = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert model.peft_config["second"].target_modules == places


SOME_LAYERS = {"layers_to_transform": [0, 2, 3], "rank_pattern": {}, "use_rslora": True}


@pytest.mark.parametrize("config", [{}, pytest.param(SOME_LAYERS, marks=pytest.mark.slow)])
def test_a_carried_adapter_is_saved_and_loaded_like_any_other(tmp_path: Path, config: dict[str, Any]) -> None:
    model = fxfusion.fuse(adapted(llama(), **config), plan())
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    assert relative(logits(base), wanted) > RED
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where keys of the adapter are missing
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded), wanted)


@pytest.mark.slow
def test_a_carried_adapter_is_merged_like_any_other() -> None:
    model = fxfusion.fuse(adapted(llama()), plan())
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.gate_proj) is torch.nn.Linear
    assert relative(logits(merged), wanted) <= LIMIT
    fxfusion.unfuse(merged)
    assert len(merged.model.layers) == 4


def test_merging_on_request() -> None:
    model = adapted(llama(), modules_to_save=["lm_head"], use_dora=True, rank_pattern={}, alpha_pattern={})
    randomised(model, seed=9, only="modules_to_save")
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    fused = fxfusion.fuse(model, plan(), adapters="merge")
    assert type(fused) is type(llama()) and not hasattr(fused, "peft_config")
    assert not any("lora" in name or "modules_to_save" in name for name in fused.state_dict())
    assert relative(logits(fused), wanted) <= LIMIT
    peft.get_peft_model(fused, peft.LoraConfig(target_modules=FFN))


def unlike(model: Any, before: dict[str, Tensor]) -> list[str]:
    """Names of what is not as it was, to the bit."""
    now = model.state_dict()
    return [name for name in {**before, **now} if name not in now or not now[name].equal(before.get(name, now[name]))]


TAKEN_BACK: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(llama().bfloat16()),
    "dora": lambda: adapted(llama().bfloat16(), use_dora=True, rank_pattern={}, alpha_pattern={}),
    "tokens": lambda: adapted(llama().bfloat16(), trainable_token_indices=[1, 5]),
    "saved head": lambda: adapted(llama().bfloat16(), modules_to_save=["lm_head"]),
    "ia3": lambda: _ia3(),
    "replicated": lambda: adapted(llama().bfloat16(), layer_replication=[(0, 3), (1, 4)]),
    "biases": lambda: adapted(llama().bfloat16(), lora_bias=True),
}


@pytest.mark.parametrize("bad", [{"groups": [[2, 3]]}, {"groups": [[97, 98]]}, "late"])
@pytest.mark.parametrize("kind", TAKEN_BACK)
def test_a_merge_that_comes_to_nothing_is_taken_back(kind: str, bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TAKEN_BACK[kind]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, computed = repr(model), logits(model)
    if bad == "late":  # all is merged and dropped by then
        monkeypatch.setattr("fxfusion.models.ffn_surgery.fuse.CacheProof", None)
    with pytest.raises((fxfusion.FxFusionError, AttributeError)):
        fxfusion.fuse(model, plan() if bad == "late" else bad, adapters="merge")
    assert not unlike(model, before)
    assert repr(model) == text and logits(model).equal(computed)
    wrappers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    assert wrappers and not any(module.merged_adapters for module in wrappers)


def test_repeated_layers_are_refused_and_the_advice_works() -> None:
    """Their weights are one: PEFT's own `merge_and_unload` adds every adapter to them."""
    config = {"layer_replication": [(0, 3), (1, 4)], "rank_pattern": {}, "alpha_pattern": {}}
    model = adapted(llama(), **config)
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    with pytest.raises(SurgeryError, match=r"layer_replication\): fuse with adapters='merge'$"):
        fxfusion.fuse(model, plan())
    fused = fxfusion.fuse(model, plan(), adapters="merge")
    assert relative(logits(fused), wanted) <= LIMIT and len(fused.model.layers) == 4


def test_trained_tokens_are_carried_along_and_merged() -> None:
    for mode in ("carry", "merge"):
        model = adapted(llama(), trainable_token_indices=token_ids()[0, :3].tolist())
        randomised(model, seed=12, only="trainable_tokens_delta")
        wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
        fused = fxfusion.fuse(model, plan(), adapters=mode)  # type: ignore[arg-type]
        assert relative(logits(fused), wanted) <= LIMIT
        assert any("trainable_tokens" in name for name in fused.state_dict()) == (mode == "carry")


def test_an_adapter_with_biases_is_merged_into_layers_without() -> None:
    model = adapted(llama(), lora_bias=True, rank_pattern={}, alpha_pattern={})
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    fused = fxfusion.fuse(model, plan(), adapters="merge")
    assert relative(logits(fused), wanted) <= LIMIT


def test_each_advice_for_a_norm_with_a_bias_works() -> None:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = Starcoder2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)

    def made(**more: Any) -> Any:
        model = randomised(Starcoder2ForCausalLM(copy.deepcopy(config)).eval(), seed=3)
        return adapted(model, target_modules=["c_fc", "c_proj"], rank_pattern={}, alpha_pattern={}, **more)

    advice = "fuse with norm='last' or with adapters='merge', or train adapters with lora_bias=True"
    with pytest.raises(SurgeryError, match=f"its norm has a bias, .*: {advice}"):
        fxfusion.fuse(made(), plan())
    fxfusion.fuse(made(), plan("last"))
    fxfusion.fuse(made(), plan(), adapters="merge")
    fxfusion.fuse(made(lora_bias=True), plan())


def test_adapters_that_are_switched_off_are_not_merged() -> None:
    model = adapted(llama())
    with model.disable_adapter():
        wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
        fused = fxfusion.fuse(model, plan(), adapters="merge")
    assert relative(logits(fused), wanted) <= LIMIT


def test_carried_adapters_train() -> None:
    model = fxfusion.fuse(adapted(llama(), lora_dropout=0.1), plan())
    _step(model)
    wide = model.get_base_model().model.layers[0].mlp.gate_proj.lora_B["default"].weight
    assert wide.grad is not None and wide.grad[:64, 4:].abs().max() > 0, "the blocks off the diagonal learn too"


def _step(model: Any) -> None:
    """AdamW lowers the loss of one batch, and changes adapters alone."""
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    optimiser = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=3e-3)
    ids = token_ids()
    before = model(input_ids=ids, labels=ids).loss.item()
    model.train()
    for _ in range(5):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    assert model.eval()(input_ids=ids, labels=ids).loss.item() < before
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)


@pytest.mark.slow
def test_adapters_of_transformers_itself() -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=FFN))
    randomised(model, seed=5, only="lora_")
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    assert fxfusion.fuse(model, plan()) is model
    assert relative(logits(model), wanted) <= LIMIT


@pytest.mark.slow
def test_modules_trained_beside_the_adapter_stay_and_a_plan_still_knows_the_model() -> None:
    made_for = facts_of(llama())
    model = adapted(llama(), modules_to_save=["lm_head"], target_modules=FFN)
    randomised(model, seed=9, only="modules_to_save")
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids())
    fxfusion.fuse(model, plan().replace(model=made_for))
    assert relative(logits(model), wanted) <= LIMIT
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad


@pytest.mark.slow
def test_dropping_attention_keeps_the_other_adapters() -> None:
    model = adapted(llama())
    wanted = parallel_logits(model, DROPPED, [], token_ids())
    assert fxfusion.drop_attention(model, DROPPED) is model
    assert relative(logits(model), wanted) <= LIMIT
    names = [name for name in model.state_dict() if "q_proj.lora_A" in name]
    assert [name.split(".")[4] for name in names] == ["0", "3"]
    fxfusion.fuse(model, plan())
    assert len(model.get_base_model().model.layers) == 2


@pytest.mark.slow
def test_unfuse_keeps_the_adapters_of_other_modules() -> None:
    model = adapted(llama(), target_modules=["q_proj", "lm_head"])
    fxfusion.drop_attention(model, DROPPED)
    before = logits(model)
    fxfusion.fuse(model, plan())
    fxfusion.unfuse(model)
    assert relative(logits(model), before) <= LIMIT
    assert any("layers.3.self_attn.q_proj.lora_A" in name for name in model.state_dict())


def test_unfuse_refuses_adapters_of_a_fused_ffn() -> None:
    model = fxfusion.fuse(adapted(llama()), plan())
    before = logits(model)
    with pytest.raises(SurgeryError, match=r"layers.0.mlp.gate_proj has an adapter, .* merge it first"):
        fxfusion.unfuse(model)
    assert torch.equal(logits(model), before)


def _lora(**config: Any) -> Callable[[], Any]:
    return lambda: adapted(llama(), rank_pattern={}, alpha_pattern={}, **config)


def _merged() -> Any:
    model = adapted(llama())
    model.merge_adapter()
    return model


def _two_dropouts() -> Any:
    model = adapted(llama())
    model.get_base_model().model.layers[1].mlp.up_proj.lora_dropout["default"] = torch.nn.Dropout(0.1)
    return model


def _ia3() -> Any:
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


def _prompt() -> Any:
    return peft.get_peft_model(llama(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (_lora(use_dora=True), r"layers.0.mlp.gate_proj: a LoRA of kind DoraLinear .* fuse with adapters='merge'"),
    "IA3": (_ia3, r"layers.0.mlp.down_proj: an adapter of kind ia3.Linear cannot be carried"),
    "merged": (_merged, r"layers.0.mlp.gate_proj: its adapter is merged for the moment"),
    "dropout": (_two_dropouts, r"adapter 'default': lora_dropout differs between model.layers.0.mlp.up_proj"),
    "norm": (_lora(modules_to_save=["post_attention_layernorm"]), r"post_attention_layernorm: ModulesToSaveWrapper"),
    "prompt": (_prompt, r"adapter 'default' is a learned prompt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_is_refused(make: Callable[[], Any], message: str) -> None:
    model = make()
    before, text = {name: value.clone() for name, value in model.state_dict().items()}, repr(model)
    with pytest.raises(SurgeryError, match=message) as refused:
        fxfusion.fuse(model, plan())
    assert repr(model) == text and not unlike(model, before)
    if "adapters='merge'" in str(refused.value):  # what is advised works
        assert len(fxfusion.fuse(model, plan(), adapters="merge").model.layers) == 2
    elif "unmerge_adapter" in str(refused.value):
        model.unmerge_adapter()
        fxfusion.fuse(model, plan())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SurgeryError, match="adapters must be 'carry' or 'merge', not 'keep'"):
        fxfusion.fuse(llama(), plan(), adapters="keep")  # type: ignore[arg-type]
