"""fuse: whole layers go. Against a model whose layers were taken out by hand, by folder and by cached decoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fxfusion
from fxfusion.errors import CheckpointError, OptionError, PlanError, SurgeryError
from fxfusion.models.ffn_surgery import fuse as module
from fxfusion.models.ffn_surgery.record import plan_of
from tests.end_to_end.caching import LIMIT, RED, decoded, decoder, new_cache, off, recomputed, token_ids
from tests.end_to_end.family_table import family_named
from tests.fxfusion.models.ffn_surgery.test_fuse import assert_same, llama, snapshot

pytestmark = pytest.mark.slow
HOISTED = {"members": [2, 3], "mixers": "hoist"}


def without(model: Any, *layers: int) -> Any:
    """A copy with some decoder layers taken out by hand."""
    smaller = copy.deepcopy(model)
    kept = [layer for number, layer in enumerate(smaller.model.layers) if number not in layers]
    smaller.model.layers = nn.ModuleList(kept)
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    smaller.config.num_hidden_layers = len(kept)
    if getattr(smaller.config, "layer_types", None):
        types = [kind for number, kind in enumerate(model.config.layer_types) if number not in layers]
        smaller.config.layer_types = types
    return smaller


@pytest.mark.parametrize("removed", [[1], [0, 3], [1, 2, 3]])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_smaller_model_is_the_one_made_by_hand(family: str, removed: list[int]) -> None:
    model = decoder(family_named(family))
    by_hand, ids = without(model, *removed), token_ids()
    assert fxfusion.fuse(model, {"removed": removed}) is model
    wanted = recomputed(by_hand, ids)
    assert torch.equal(recomputed(model, ids), wanted)
    assert off(decoded(model, ids, new_cache("dynamic", model)), wanted) <= LIMIT
    assert off(recomputed(decoder(family_named(family)), ids), wanted) > RED, "removing changes the model"
    assert list(model.state_dict()) == list(by_hand.state_dict())
    assert model.config.num_hidden_layers == len(model.model.layers) == 4 - len(removed)
    assert getattr(model.config, "layer_types", None) == getattr(by_hand.config, "layer_types", None)


def test_layers_go_beside_groups() -> None:
    """The numbers of the plan are those of the model as it was loaded."""
    plan = {"removed": [1], "groups": [HOISTED]}
    model, by_hand, ids = llama(), without(llama(), 1), token_ids()
    fxfusion.fuse(model, plan)
    fxfusion.fuse(by_hand, {"groups": [{"members": [1, 2], "mixers": "hoist"}]})
    assert off(recomputed(model, ids), recomputed(by_hand, ids)) <= LIMIT
    assert model.config.fxfusion["fused"]["kept"] == [0, 2, 3] and model.config.fxfusion["fused"]["removed"] == [1]
    assert plan_of(model) == fxfusion.FusionPlan(**plan)
    with pytest.raises(SurgeryError, match=r"layers \[1\] were removed with their weights"):
        fxfusion.unfuse(model)
    with pytest.raises(SurgeryError, match="fused already"):
        fxfusion.fuse(model, plan)


def test_layers_go_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama().config)
    fxfusion.fuse(model, {"removed": [1], "groups": [HOISTED]})
    assert model.model.layers[2].mlp.gate_proj.out_features == 2 * llama().model.layers[2].mlp.gate_proj.out_features
    assert model.config.num_hidden_layers == 3


def test_a_proof_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = snapshot(model)

    def fail(*_: Any) -> None:
        raise SurgeryError("the logits are off")

    for groups in ([], [HOISTED]):
        monkeypatch.setattr(module.ParallelForm, "check", fail)
        with pytest.raises(SurgeryError, match="are off"):
            fxfusion.fuse(model, {"removed": [1], "groups": groups})
        assert_same(model, before)


def test_the_proof_sees_another_layer_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = llama(), module.DepthEditor.without
    before = snapshot(model)
    monkeypatch.setattr(module.DepthEditor, "without", lambda self, gone: own(self, [2]))
    with pytest.raises(SurgeryError, match="logits are off by"):
        fxfusion.fuse(model, {"removed": [1]})
    assert_same(model, before)


def test_hooks_and_layers_that_are_not_there_are_refused() -> None:
    model = llama()
    with pytest.raises(PlanError, match="layer 4 does not exist"):
        fxfusion.fuse(model, {"removed": [4]})
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(SurgeryError, match=r"model.layers.1.mlp.* has hooks"):
        fxfusion.fuse(model, {"removed": [1]})


def test_the_compiler_refuses_such_a_plan() -> None:
    for call in (
        lambda: fxfusion.explain(llama(), token_ids(), plan={"removed": [1]}),
        lambda: torch.compile(llama(), backend="ffn_fusion", options={"plan": {"removed": [1]}})(token_ids()),
    ):
        with pytest.raises(Exception, match=r"removes layers \[1\], and the compiler takes no layer out") as caught:
            call()
        assert isinstance(caught.value, OptionError) or "OptionError" in repr(caught.value)


@pytest.mark.parametrize("own", [True, False])
def test_the_folder_is_a_plain_smaller_model(own: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = fxfusion.fuse(llama(), {"removed": [0, 2]})
    where, wanted = tmp_path / "smaller", recomputed(model, token_ids())
    if own:
        model.save_pretrained(where)
    else:
        fxfusion.save_pretrained(model, where)
    assert not any("will not load this folder" in str(one.message) for one in recwarn)
    for loaded in (AutoModelForCausalLM.from_pretrained(where), fxfusion.from_pretrained(where)):
        assert off(recomputed(loaded, token_ids()), wanted) <= 1e-6 and len(loaded.model.layers) == 2
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert not hasattr(loaded.config, "fxfusion"), "it is a model like any other"
    assert model.config.fxfusion["fused"]["removed"] == [0, 2]


def test_a_plan_that_removes_is_applied_while_saving(tmp_path: Path) -> None:
    model = llama()
    fxfusion.save_pretrained(model, tmp_path / "one", plan={"removed": [3]})
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "one").model.layers) == 3 == len(model.model.layers)
    with pytest.raises(CheckpointError, match=r"layers \[1\] were removed, and others fused"):
        fxfusion.save_pretrained(llama(), tmp_path / "two", plan={"removed": [1], "groups": [HOISTED]})
    both = fxfusion.fuse(llama(), {"removed": [1], "dropped_attention": [2]})
    with pytest.raises(CheckpointError, match=r"layers \[1\] were removed, and others fused or left without"):
        fxfusion.save_pretrained(both, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_nemotron_nas_holds_both(tmp_path: Path) -> None:
    model = fxfusion.fuse(llama(), {"removed": [1], "groups": [HOISTED]})
    with pytest.warns(UserWarning, match="members of its fused FFNs are not kept, since layers were removed"):
        fxfusion.save_pretrained(model, tmp_path / "nas", "nemotron-nas")
    loaded = fxfusion.from_pretrained(tmp_path / "nas")
    assert off(recomputed(loaded, token_ids()), recomputed(model, token_ids())) <= LIMIT
    assert len(loaded.model.layers) == 3


def test_a_plan_beside_original_weights_is_applied_while_they_are_read(tmp_path: Path) -> None:
    plan = fxfusion.FusionPlan(removed=[1], groups=[HOISTED])
    llama().save_pretrained(tmp_path / "folder")
    plan.save(tmp_path / "folder" / "fxfusion_plan.yaml")
    wanted = recomputed(fxfusion.fuse(llama(), plan), token_ids())
    assert off(recomputed(fxfusion.from_pretrained(tmp_path / "folder"), token_ids()), wanted) <= LIMIT


def test_adapters_of_removed_layers_go_and_others_stay() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(llama(), config)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.normal_()
    wanted = recomputed(without(copy.deepcopy(tuned).merge_and_unload(), 1), token_ids())
    fused = fxfusion.fuse(tuned, {"removed": [1]})
    assert fused is tuned and off(recomputed(fused, token_ids()), wanted) <= LIMIT
    assert sum("lora_A" in name for name, _ in fused.named_parameters()) == 6
