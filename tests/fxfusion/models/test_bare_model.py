"""What others wrap around a model is looked through, or refused by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import PlanError, SurgeryError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.fingerprint import facts_of
from tests.end_to_end.eager_parallel import llama, parallel_logits, relative, token_ids

PLAN = {"dropped_attention": [1, 2], "groups": [[0, 1, 2]]}


class DistributedDataParallel(nn.Module):
    """As torch's looks from outside: one child, `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def model() -> Any:
    return llama()


def test_compile_and_adapters_are_looked_through(model: Any) -> None:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for outer in (model, torch.compile(model), wrapped, torch.compile(wrapped)):
        assert bare_model(outer) is model


def test_what_is_measured_has_the_names_of_the_model_inside(model: Any) -> None:
    """With the adapters in it, and so that a plan fits the model itself."""
    ids = [token_ids()]
    plain = fxfusion.attention_scores(model, ids, layers=[1, 2])
    facts = facts_of(model)
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    found = fxfusion.attention_scores(torch.compile(outer), ids, layers=[1, 2])
    assert [score.name for score in found.scores] == [score.name for score in plain.scores]
    pairs = zip(found.scores, plain.scores, strict=True)
    assert all(abs(one.value.value / two.value.value - 1) > 1e-3 for one, two in pairs)
    plan = fxfusion.make_plan(outer, ids, drop=1)
    assert plan.model == facts_of(torch.compile(outer)) == facts_of(outer)
    assert plan.model.tensors != facts.tensors  # the adapters count: what was measured depends on them
    assert plan.model.model_copy(update={"tensors": facts.tensors}) == facts
    seen = fxfusion.explain(torch.compile(outer), input_ids=token_ids(), use_cache=False)
    assert all(refusal.layer.startswith("model.layers.") for graph in seen.graphs for refusal in graph.refusals)
    fxfusion.fuse(outer, plan)


def test_learned_prompts_are_refused_where_layers_are_looked_at(model: Any) -> None:
    prompts = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(SurgeryError, match="adapter 'default' is a learned prompt"):
        fxfusion.attention_scores(prompts, [token_ids()])


@pytest.mark.parametrize("more", [{"drop": 1}, {"roads": ("hoist",), "target_depth": 3}], ids=["drop", "hoist"])
def test_ffns_that_adapters_hide_are_not_planned_as_if_they_were_none(model: Any, more: dict[str, Any]) -> None:
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(SurgeryError, match="4 FFNs cannot be seen, since adapters are active"):
        fxfusion.make_plan(outer, [token_ids()], **more)
    with pytest.raises(SurgeryError, match="4 FFNs cannot be seen"):
        fxfusion.sweep(outer, [token_ids()])
    with outer.disable_adapter():
        assert fxfusion.make_plan(outer, [token_ids()], drop=1).dropped_attention


@pytest.mark.parametrize("act", [fxfusion.fuse, fxfusion.drop_attention])
def test_a_wrapper_that_knows_the_parameters_is_refused(model: Any, act: Any) -> None:
    with pytest.raises(SurgeryError, match=r"DistributedDataParallel knows the parameters .* \(`.module`\)"):
        act(DistributedDataParallel(model), PLAN if act is fxfusion.fuse else [1])
    assert len(model.model.layers) == 4


def test_real_ddp_is_refused(model: Any, tmp_path: Any) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(SurgeryError, match="DistributedDataParallel knows the parameters"):
            fxfusion.fuse(nn.parallel.DistributedDataParallel(model), PLAN)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_model_compiles_anew_after_fusing(model: Any) -> None:
    wanted = parallel_logits(model, [1, 2], [[0, 1, 2]], token_ids())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(input_ids=token_ids(), use_cache=False).logits
        assert fxfusion.fuse(compiled, PLAN) is compiled
        found = compiled(input_ids=token_ids(), use_cache=False).logits
    assert relative(found, wanted) <= 1e-5 < 1e-3 < relative(found, before)


@pytest.mark.slow
def test_a_model_compiled_in_place_is_fused(model: Any) -> None:
    wanted = parallel_logits(model, [1, 2], [[0, 1, 2]], token_ids())
    model.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=token_ids(), use_cache=False)
        fxfusion.fuse(model, PLAN)
        assert relative(model(input_ids=token_ids(), use_cache=False).logits, wanted) <= 1e-5


def _tied_within_the_group(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.weight = model.model.layers[1].mlp.gate_proj.weight


def _shared_module(model: Any) -> None:
    model.model.layers[2].mlp = model.model.layers[1].mlp


def _tied_with_another_layer(model: Any) -> None:
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


@pytest.mark.parametrize("tie", [_tied_within_the_group, _shared_module, _tied_with_another_layer])
def test_tied_ffn_weights_are_refused_by_name(model: Any, tie: Any) -> None:
    tie(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((PlanError, SurgeryError), match=r"model.layers.\d.mlp.*model.layers.\d.mlp"):
        fxfusion.fuse(model, PLAN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
