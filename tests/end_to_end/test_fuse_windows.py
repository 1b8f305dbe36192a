"""Windows fused in a model's own modules: equal to the eager hoisted form, given back by `unfuse`, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfusion
from fxfusion import FusionPlan
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.errors import CheckpointError, PlanError, SurgeryError
from tests.end_to_end.caching import decoded, new_cache, token_ids
from tests.end_to_end.eager_hoisted import hoisted, hoisted_by_hand
from tests.end_to_end.eager_parallel import llama
from tests.end_to_end.families import layers_of, make_inputs, relative, run
from tests.end_to_end.family_table import family_named
from tests.end_to_end.test_fuse_families import check_tensors
from tests.end_to_end.test_hoist_families import intact

PLAN = FusionPlan(groups=[[0, 1], [2, 3]], hoist=True)
WINDOWS = [[0, 1], [2, 3]]
QUICK = "llama phi3 gemma granite gpt2 starcoder2".split()
SLOW = "mistral qwen2 qwen3 smollm3 glm olmo gpt_neo nemotron stablelm gpt_neox-sequential".split()
RED = 1e-4


def case(name: str, norm: str = "fold", slow: bool = False) -> Any:
    return pytest.param(name, norm, id=f"{name}-{norm}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("name", "norm"), [*map(case, QUICK), case("llama", "last"), *(case(name, slow=True) for name in SLOW)]
)
def test_a_fused_window_equals_the_hoisted_form_and_comes_apart_again(name: str, norm: str) -> None:
    family = family_named(name)
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    with hoisted(model, family, WINDOWS):
        wanted = run(model, inputs)
    sequential, weights = run(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    config, kinds = model.config.to_dict(), [type(part) for part in model.modules()]
    plan = PLAN.replace(norm=norm)

    assert fxfusion.fuse(model, plan) is model

    fused = run(model, inputs)
    if norm == "fold":
        assert relative(fused, wanted) <= max(family.limit, 1e-10)
    assert relative(fused, sequential) > RED
    assert len(layers_of(model, family)) == 4
    assert model.config.fxfusion["fused"]["groups"] == [{"members": w, "mixers": "hoist"} for w in WINDOWS]
    large = [sum(value.numel() for value in layer.parameters()) for layer in layers_of(model, family)]
    assert large[0] == large[2] < large[1] == large[3], "inner layers keep their attention alone"
    check_tensors(model, weights, exact=False)

    fxfusion.unfuse(model)
    assert relative(run(model, inputs), sequential) <= 1e-12
    assert model.config.to_dict() == config and list(model.state_dict()) == list(weights)
    assert [type(part) for part in model.modules()] == kinds


def test_norm_last_is_the_last_members() -> None:
    family = family_named("llama")
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    by_hand = copy.deepcopy(model)
    for one, other in WINDOWS:
        layers = by_hand.model.layers
        layers[one].post_attention_layernorm = layers[other].post_attention_layernorm
    wanted = hoisted_by_hand(by_hand, WINDOWS, inputs["input_ids"])
    assert relative(run(fxfusion.fuse(model, PLAN.replace(norm="last")), inputs), wanted) <= family.limit


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding(kind: str) -> None:
    family = family_named("llama")
    model: Any = intact(family, use_cache=True)
    ids = token_ids(length=10)
    with hoisted(model, family, WINDOWS):
        wanted = decoded(model, ids, new_cache(kind, model, 10))
    fxfusion.fuse(model, PLAN)
    assert relative(decoded(model, ids, new_cache(kind, model, 10)), wanted) <= family.limit


def test_windows_beside_runs_without_attention() -> None:
    """A plan may mix all that it can: layer 2 loses its attention and goes, a window keeps its own."""
    model: Any = llama(6).double()
    ids = token_ids(length=8) % 64
    plan = FusionPlan(groups=[[1, 2], {"members": [3, 4, 5], "mixers": "hoist"}], dropped_attention=[2], norm="fold")
    compiled = torch.compile(
        fxfusion.drop_attention(copy.deepcopy(model), [2]),
        backend=fxfusion.ffn_fusion,
        options={"plan": plan, "compiler": "eager", "strict": True},
    )
    wanted = run(compiled, {"input_ids": ids})
    before = run(model, {"input_ids": ids})
    fxfusion.fuse(model, plan)
    assert len(model.model.layers) == 5
    assert relative(run(model, {"input_ids": ids}), wanted) <= 1e-10
    fxfusion.unfuse(model)
    assert len(model.model.layers) == 6 and relative(run(model, {"input_ids": ids}), before) > 0.01


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "gpt2"))])
@pytest.mark.slow
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    family = family_named(name)
    model: Any = intact(family).float()
    inputs = make_inputs(family, model)
    fxfusion.fuse(model, PLAN)
    wanted = run(model, inputs)
    formats = ["canonical"] if name == "gpt2" else ["canonical", "nemotron-nas"]
    for kind in formats:
        with pytest.warns(UserWarning, match="no tokenizer"):
            fxfusion.save_pretrained(model, tmp_path / kind, format=kind)
        assert relative(run(fxfusion.from_pretrained(tmp_path / kind), inputs), wanted) <= 1e-5
    back = fxfusion.from_pretrained(tmp_path / "canonical")
    assert FusionPlan.load(tmp_path / "canonical" / "fxfusion_plan.yaml").groups == PLAN.groups
    sequential = run(fxfusion.from_pretrained(tmp_path / "canonical", fused=False), inputs)
    assert relative(run(fxfusion.unfuse(back), inputs), sequential) <= 1e-5 < relative(sequential, wanted)
    for kind in formats[1:]:
        members = fxfusion.from_pretrained(tmp_path / kind, fused=False)
        assert relative(run(members, inputs), sequential) <= 1e-5 and type(members) is type(model)


def test_the_nemotron_nas_blocks_of_a_window() -> None:
    model: Any = fxfusion.fuse(llama(), {"groups": [[1, 2, 3]], "hoist": True})
    planned = plan_export(model)
    blocks = planned.config["block_configs"]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, True, True, False]
    assert not any(block["attention"]["no_op"] for block in blocks)
    assert planned.engines["vllm"] is None and planned.engines["mlx-lm"] is None
    assert planned.engines["llama.cpp"] == "layer 1 has attention and no FFN, and the engine would skip both"
    assert all("layers.1.mlp" not in one.name for one in planned.tensors)


def test_a_first_layer_without_attention_is_refused() -> None:
    plan = {"groups": [{"members": [0, 1], "mixers": "hoist"}], "dropped_attention": [0]}
    model = fxfusion.fuse(llama(), plan)
    with pytest.raises(CheckpointError, match="needs attention in its first layer, for vLLM; model.layers.0 has none"):
        plan_export(fxfusion.fuse(llama(), {"groups": [[0, 1]], "dropped_attention": [0, 1]}))
    blocks = plan_export(model).config["block_configs"]
    assert len(blocks) == 3 and not blocks[0]["ffn"]["no_op"], "a layer without either is left out"


@pytest.mark.parametrize(
    ("name", "plan", "error", "message"),
    [
        ("llama", {"groups": [[1, 2]]}, PlanError, "group 0 .* hoist"),
        ("llama", {"groups": [[1, 3]], "hoist": True}, PlanError, r"window \[1, 3\]: the FFN of model.layers.2 lies"),
        ("llama", {"groups": [[3, 4]], "hoist": True}, PlanError, "layer 4 does not exist|4 holds no FFN"),
        ("cohere", {"groups": [[1, 2]], "hoist": True}, PlanError, r"window \[1, 2\]: none of them"),
        ("opt", {"groups": [[1, 2]], "hoist": True}, SurgeryError, "the FFN of layer 1 is no module of its own"),
        ("olmo2", {"groups": [[1, 2]], "hoist": True}, SurgeryError, r"model.layers.2.mlp: a norm stands on the FFN's"),
        ("gemma2", {"groups": [[1, 2]], "hoist": True}, SurgeryError, r"layers.2.mlp: a norm .* torch.compile\("),
    ],
)
def test_what_is_refused_leaves_the_model_alone(
    name: str, plan: dict[str, Any], error: type[Exception], message: str
) -> None:
    family = family_named(name)
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    before, text = run(model, inputs), str(model)
    with pytest.raises(error, match=message):
        fxfusion.fuse(model, plan)
    assert torch.equal(run(model, inputs), before) and str(model) == text


def test_hooks_are_not_lost() -> None:
    model = llama()
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(SurgeryError, match=r"model.layers.1.mlp.act_fn has hooks"):
        fxfusion.fuse(model, {"groups": [[1, 2]], "hoist": True})


def test_a_failed_proof_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.models.ffn_surgery import fuse as surgery

    def refuse(*_: Any) -> None:
        raise SurgeryError("decodes badly")

    model: Any = llama().double()
    inputs, text = {"input_ids": token_ids() % 64}, str(model)
    before = run(model, inputs)
    monkeypatch.setattr(surgery.CacheProof, "check", refuse)
    with pytest.raises(SurgeryError, match="decodes badly"):
        fxfusion.fuse(model, PLAN)
    assert str(model) == text and relative(run(model, inputs), before) < 1e-12
