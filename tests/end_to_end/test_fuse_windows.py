"""Windows in a model's own modules: equal to the eager form, cached, given back, saved and loaded, refused.

"hoist": attention by attention, then the FFNs as one. "wide": the attentions are one module too, in one layer.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion import FusionPlan
from fxfusion.checkpoints.empty_model import outline
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.errors import CheckpointError, PlanError, SurgeryError
from fxfusion.models.ffn_surgery.record import fused_state, plan_of
from fxfusion.models.ffn_surgery.unfuse import unfused_tensors
from tests.end_to_end.caching import decoded, new_cache, token_ids
from tests.end_to_end.eager_hoisted import hoisted, hoisted_by_hand
from tests.end_to_end.eager_parallel import llama
from tests.end_to_end.families import Family, layers_of, make_inputs, relative, run
from tests.end_to_end.family_table import family_named
from tests.end_to_end.test_fuse_families import check_tensors
from tests.end_to_end.test_hoist_families import intact

WINDOWS = [[0, 1], [2, 3]]
RED = 1e-4
# Grouped queries, biases, one matrix for all three (behind each other, per head, Conv1D), norms of queries and keys,
# numbers of heads read from the module and from the config, a scale behind the attention.
QUICK = "llama qwen2 qwen3 phi3 gpt2 granite opt".split()
SLOW = "mistral gemma starcoder2 olmo nemotron glm stablelm gpt_neox-sequential".split()
HOISTED_TOO = "gemma granite starcoder2 gpt_neo smollm3".split()


def wide(*windows: list[int], **fields: Any) -> FusionPlan:
    return FusionPlan(groups=[{"members": window, "mixers": "wide"} for window in windows], **fields)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


PLAN = wide(*WINDOWS)
PLANS = {"wide": PLAN, "hoist": FusionPlan(groups=WINDOWS, hoist=True)}


def eager(model: nn.Module, family: Family, inputs: Any, mixers: str = "wide", **options: Any) -> Tensor:
    with hoisted(model, family, WINDOWS, wide=mixers == "wide", **options):
        return run(model, inputs)


CASES = [(name, mixers) for name in (*QUICK, *SLOW) for mixers in PLANS if (name, mixers) != ("opt", "hoist")]
CASES += [(name, "hoist") for name in HOISTED_TOO if (name, "hoist") not in CASES]
FAST_CASES = [*((name, "wide") for name in QUICK), *((name, "hoist") for name in ("llama", "phi3", "gpt2"))]


@pytest.mark.parametrize(("name", "mixers"), [case if case in FAST_CASES else slow(*case) for case in CASES])
def test_a_window_equals_its_eager_form_and_comes_apart_again(name: str, mixers: str) -> None:
    family = family_named(name)
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    wanted, other = (eager(model, family, inputs, kind) for kind in (mixers, *PLANS.keys() - {mixers}))
    sequential = run(model, inputs)
    assert min(relative(other, wanted), relative(sequential, wanted)) > 0.01, "too close to tell the forms apart"
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    config, kinds = model.config.to_dict(), [type(part) for part in model.modules()]
    own_config = [vars(part).get("config") for part in model.modules()]

    assert fxfusion.fuse(model, PLANS[mixers]) is model

    assert relative(run(model, inputs), wanted) <= max(family.limit, 1e-10)
    layers = layers_of(model, family)
    assert model.config.fxfusion["fused"]["groups"] == [{"members": w, "mixers": mixers} for w in WINDOWS]
    if mixers == "wide":
        assert len(layers) == 2 and model.config.fxfusion["fused"]["kept"] == [1, 3]
        assert [type(part) for part in layers[0].modules()] == kinds_of(kinds, model, family)
    else:
        large = [sum(value.numel() for value in layer.parameters()) for layer in layers]
        assert large[0] == large[2] < large[1] == large[3], "inner layers keep their attention alone"
    check_tensors(model, weights, exact=False)

    fxfusion.unfuse(model)
    assert relative(run(model, inputs), sequential) <= 1e-12
    assert model.config.to_dict() == config and list(model.state_dict()) == list(weights)
    assert [type(part) for part in model.modules()] == kinds
    assert all(one is vars(part).get("config") for one, part in zip(own_config, model.modules(), strict=True))
    assert relative(eager(model, family, inputs, mixers), wanted) <= 1e-10, "all numbers of heads are as they were"


def kinds_of(kinds: list[type], model: nn.Module, family: Family) -> list[type]:
    """Of the modules of one layer, out of those of the whole model before it was fused."""
    layer = type(layers_of(model, family)[0])
    first = kinds.index(layer)
    return kinds[first : kinds.index(layer, first + 1)]


def test_the_wide_form_written_by_hand_is_the_same() -> None:
    family = family_named("llama")
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    by_hand = hoisted_by_hand(model, WINDOWS, inputs["input_ids"], wide=True)
    assert relative(eager(model, family, inputs), by_hand) < 1e-12


@pytest.mark.parametrize(("name", "mixers"), [("llama", "wide"), slow("phi3", "wide"), ("llama", "hoist")])
def test_the_last_members_norm(name: str, mixers: str) -> None:
    """The plan's norm is of the FFNs; each attention keeps its own, as in a graph."""
    family = family_named(name)
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    wanted = eager(model, family, inputs, mixers, last_norm=True)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    fxfusion.fuse(model, PLANS[mixers].replace(norm="last"))
    assert relative(run(model, inputs), wanted) <= family.limit
    for key, value in unfused_tensors(model):
        same = torch.equal(value, weights[key])
        assert same or ("self_attn" in key and torch.allclose(value, weights[key], rtol=1e-6)), key


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize(("kind", "mixers"), [("dynamic", "wide"), ("static", "wide"), ("static", "hoist")])
def test_cached_decoding(name: str, kind: str, mixers: str) -> None:
    family = family_named(name)
    model: Any = intact(family, use_cache=True)
    ids = token_ids(length=10)
    wanted = eager(model, family, {"input_ids": ids, "use_cache": False}, mixers)
    fxfusion.fuse(model, PLANS[mixers])
    cache = new_cache(kind, model, 10)
    assert relative(decoded(model, ids, cache), wanted) <= 1e-6
    used = [layer for layer in cache.layers if layer.is_initialized]
    assert len(used) == (2 if mixers == "wide" else 4)
    assert mixers == "hoist" or used[0].keys.shape[1] > 1, "one slot for each block, with all its heads"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_attentions_that_slide_together(kind: str) -> None:
    """The block's slot of the cache is one of their kind, though the layers before it are of another."""
    types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    given = {"layer_types": types, "sliding_window": 4, "use_sliding_window": True, "num_key_value_heads": 1}
    family = family_named("qwen2")
    model: Any = intact(family, use_cache=True, **given)
    ids = token_ids(length=10)
    with hoisted(model, family, WINDOWS, wide=True):
        wanted = decoded(model, ids, new_cache(kind, model, 10))
    with pytest.raises(SurgeryError, match=r"layers \[1, 2\] cannot be joined .* compute differently"):
        fxfusion.fuse(model, wide([1, 2]))
    fxfusion.fuse(model, PLAN)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    cache = new_cache(kind, model, 10)
    assert relative(decoded(model, ids, cache), wanted) <= 1e-6
    assert [layer.is_sliding for layer in cache.layers] == [False, True] and cache.layers[1].keys.shape[2] <= 4
    for number in (0, 1):
        model.model.layers[number].self_attn.sliding_window = None
    model.config.layer_types = ["full_attention"] * 2
    assert relative(decoded(model, ids, new_cache(kind, model, 10)), wanted) > RED, "ten tokens show the window"


def test_generation() -> None:
    model: Any = fxfusion.fuse(intact(family_named("qwen3"), use_cache=True), PLAN)
    ids = token_ids()[:1, :4]
    found = [
        model.generate(ids, max_new_tokens=5, do_sample=False, **given)
        for given in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_half_precision() -> None:
    family = family_named("phi3")
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    half = copy.deepcopy(model).bfloat16()
    truth = eager(copy.deepcopy(half).double(), family, inputs)
    wanted = eager(half, family, inputs).double() - truth
    found = run(fxfusion.fuse(half, PLAN), inputs).double() - truth
    assert 0 < found.square().mean().sqrt() <= 2 * wanted.square().mean().sqrt()


def test_copies_and_pickles() -> None:
    """A layer that reads its number of heads from the config has a config of its own, which must follow."""
    family = family_named("phi3")
    model: Any = intact(family).float()
    inputs = make_inputs(family, model)
    sequential = run(model, inputs)
    wanted = run(fxfusion.fuse(model, PLAN), inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, inputs), wanted)
        own = copied.model.layers[0].self_attn.config
        assert own.num_attention_heads == 2 * copied.config.num_attention_heads
        copied.set_attn_implementation("sdpa")
        assert own._attn_implementation == "sdpa" and model.config._attn_implementation == "eager"
        assert relative(run(copied, inputs), wanted) < 1e-5
        fxfusion.unfuse(copied)
        assert relative(run(copied, inputs), sequential) < 1e-5
        assert copied.model.layers[1].self_attn.config is copied.config


@pytest.mark.parametrize(
    ("dropped", "kept", "attentions"),
    [slow([2], [0, 3, 4, 5], [3]), ([3], [0, 2, 4, 5], [2]), slow([2, 3], [0, 1, 4, 5], [])],
)
def test_windows_beside_dropped_attention(dropped: list[int], kept: list[int], attentions: list[int]) -> None:
    """What has no attention in the window adds its FFN; the block stays where its last attention was."""
    model: Any = llama(6).double()
    ids = token_ids(length=8) % 64
    plan = wide([1, 2, 3], dropped_attention=dropped)
    compiled = torch.compile(
        fxfusion.drop_attention(copy.deepcopy(model), dropped),
        backend=fxfusion.ffn_fusion,
        options={"plan": plan, "compiler": "eager", "strict": True},
    )
    wanted = run(compiled, {"input_ids": ids})
    fxfusion.fuse(model, plan)
    state = fused_state(model)
    assert state is not None and [*state.recipe.kept] == kept and [*state.recipe.attentions] == attentions
    assert relative(run(model, {"input_ids": ids}), wanted) <= 1e-10
    fxfusion.unfuse(model)
    again = fxfusion.drop_attention(llama(6).double(), dropped)
    assert relative(run(model, {"input_ids": ids}), run(again, {"input_ids": ids})) <= 1e-12


def test_all_kinds_of_groups_in_one_plan() -> None:
    model: Any = llama(8).double()
    inputs = {"input_ids": token_ids(length=8) % 64}
    groups: list[Any] = [[0, 1], {"members": [2, 3], "mixers": "wide"}, {"members": [4, 5, 6], "mixers": "hoist"}]
    plan = FusionPlan(groups=groups, dropped_attention=[1], norm="last")
    compiled = torch.compile(
        fxfusion.drop_attention(copy.deepcopy(model), [1]),
        backend=fxfusion.ffn_fusion,
        options={"plan": plan, "compiler": "eager", "strict": True},
    )
    wanted, before = run(compiled, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    fxfusion.fuse(model, plan)
    assert len(model.model.layers) == 6 and relative(run(model, inputs), wanted) <= 1e-10
    assert plan_of(model).groups == plan.groups
    found = dict(unfused_tensors(model))
    assert all(torch.allclose(found[key], value) for key, value in before.items() if key in found)
    assert before.keys() - found.keys() == {
        key for key in before if "layers.1.self_attn" in key or "1.input_lay" in key
    }


@pytest.mark.parametrize(
    ("name", "mixers"), [("qwen3", "wide"), slow("llama", "hoist"), slow("gpt2", "wide"), slow("phi3", "hoist")]
)
def test_saved_and_loaded(tmp_path: Path, name: str, mixers: str) -> None:
    family = family_named(name)
    model: Any = intact(family).float()
    inputs = make_inputs(family, model)
    sequential = run(model, inputs)
    wanted = run(fxfusion.fuse(model, PLANS[mixers]), inputs)
    formats = ["canonical", "nemotron-nas"] if mixers == "hoist" else ["canonical"]
    for kind in formats:
        with pytest.warns(UserWarning, match="no tokenizer"):
            fxfusion.save_pretrained(model, tmp_path / kind, format=kind)
        back = fxfusion.from_pretrained(tmp_path / kind)
        assert relative(run(back, inputs), wanted) <= 1e-5
        plain = fxfusion.from_pretrained(tmp_path / kind, fused=False)
        assert type(plain) is type(model)
        assert relative(run(plain, inputs), sequential) <= 1e-5 < relative(sequential, wanted)
    back = fxfusion.from_pretrained(tmp_path / "canonical")
    assert FusionPlan.load(tmp_path / "canonical" / "fxfusion_plan.yaml").groups == PLANS[mixers].groups
    assert relative(run(fxfusion.unfuse(back), inputs), sequential) <= 1e-5


def test_no_other_format_holds_one(tmp_path: Path) -> None:
    model = fxfusion.fuse(llama(), wide([1, 2]))
    with pytest.raises(CheckpointError, match=r"one number of heads for all layers, and layers \[1, 2\] .*hoist"):
        fxfusion.save_pretrained(model, tmp_path / "folder", format="nemotron-nas")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("name", ["phi3", *(slow(name) for name in ("llama", "gpt2", "qwen3", "opt"))])
def test_on_the_meta_device(name: str) -> None:
    """Heads are counted there, since nothing can be computed; the shapes are those of real models."""
    family = family_named(name)
    model: Any = intact(family)
    empty: Any = outline(copy.deepcopy(model.config), family.dtype).eval()
    fxfusion.fuse(empty, PLAN)
    fxfusion.fuse(model, PLAN)
    shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    assert [(key, value.shape) for key, value in empty.state_dict().items()] == shapes
    numbers = [{k: v for k, v in vars(part).items() if type(v) is int} for part in model.modules()]
    assert [{k: v for k, v in vars(part).items() if type(v) is int} for part in empty.modules()] == numbers


def test_a_trained_block_comes_apart_into_what_computes_the_same() -> None:
    family = family_named("qwen3")
    model: Any = intact(family)
    inputs = make_inputs(family, model)
    fxfusion.fuse(model, PLAN)
    block = model.model.layers[0]
    with torch.no_grad():
        for part in (block.self_attn.q_proj, block.self_attn.v_proj, block.self_attn.o_proj, block.input_layernorm):
            part.weight.mul_(1.0 + 0.1 * torch.rand_like(part.weight))
    trained = run(model, inputs)
    members = copy.deepcopy(model)
    fxfusion.unfuse(members)
    assert relative(eager(members, family, inputs), trained) <= 1e-6
    with torch.no_grad():
        block.self_attn.q_norm.weight[0].mul_(2.0)
    with pytest.raises(SurgeryError, match="q_norm.weight was shared by all heads, and training since"):
        fxfusion.unfuse(model)


def test_adapters_of_the_attentions_are_carried() -> None:
    peft = pytest.importorskip("peft")
    inputs = {"input_ids": token_ids(length=8) % 64}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], r=2, init_lora_weights=False)
    model: Any = peft.get_peft_model(llama().double(), config)
    merged = copy.deepcopy(model).merge_and_unload()
    wanted = run(fxfusion.fuse(merged, wide([1, 2])), inputs)
    fxfusion.fuse(model, wide([1, 2]))
    assert relative(run(model, inputs), wanted) <= 1e-9
    attention = model.base_model.model.model.layers[1].self_attn
    assert (
        attention.q_proj.lora_A["default"].weight.shape[0] == 4
        and attention.o_proj.lora_B["default"].weight.shape[1] == 4
    )
    with pytest.raises(SurgeryError, match="has an adapter, which no member alone could take over"):
        fxfusion.unfuse(model)


def test_gradients_flow() -> None:
    model: Any = fxfusion.fuse(llama(), wide([1, 2]))
    model(input_ids=token_ids(length=8) % 64).logits.square().mean().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in model.model.layers[1].parameters())


@pytest.mark.parametrize("mixers", PLANS)
def test_a_failed_proof_gives_everything_back(mixers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.models.ffn_surgery import fuse as surgery

    def refuse(*_: Any) -> None:
        raise SurgeryError("decodes badly")

    family = family_named("phi3")
    model: Any = intact(family)
    inputs, text = make_inputs(family, model), str(model)
    before, form = run(model, inputs), eager(model, family, inputs)
    monkeypatch.setattr(surgery.CacheProof, "check", refuse)
    with pytest.raises(SurgeryError, match="decodes badly"):
        fxfusion.fuse(model, PLANS[mixers])
    assert str(model) == text and relative(run(model, inputs), before) < 1e-12
    assert relative(eager(model, family, inputs), form) < 1e-12
    assert all(vars(part).get("config", model.config) is model.config for part in model.modules())


def sliding(model: Any) -> None:
    model.model.layers[2].self_attn.sliding_window = 5


def typed(model: Any) -> None:
    model.config.layer_types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]


def hooked(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)


def extra(model: Any) -> None:
    model.model.layers[1].self_attn.spare = nn.Parameter(torch.ones(3))


def other_eps(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.1


def fewer_heads(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    for part in (attention.q_proj, attention.o_proj):
        part.weight = nn.Parameter(part.weight[:16] if part is attention.q_proj else part.weight[:, :16])
    attention.num_key_value_groups = 1


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", sliding, "layers 2 and 1 .*: sliding_window of Qwen3Attention is 5 in one and None in the other"),
        ("llama", typed, "layers 2 and 1 .*: config.layer_types is 'sliding_attention' in one and 'full_attention'"),
        ("llama", hooked, r"model.layers.1.self_attn.q_proj has hooks"),
        ("llama", extra, r"model.layers.1.self_attn.spare is no part of what becomes wider"),
        ("llama", other_eps, r"layers \[1, 2\] cannot be joined .* have different norms.*torch.compile"),
        ("llama", fewer_heads, "have heads of other numbers or sizes"),
        ("gpt_neo", nothing, r"attn.attention.bias differs between the attentions of a wide window"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_refused_leaves_the_model_alone(name: str, change: Any, message: str) -> None:
    family = family_named(name)
    model: Any = intact(family)
    change(model)
    inputs = make_inputs(family, model)
    before, text, config = run(model, inputs), str(model), model.config.to_dict()
    with pytest.raises(SurgeryError, match=message):
        fxfusion.fuse(model, wide([1, 2]))
    assert torch.equal(run(model, inputs), before) and str(model) == text and model.config.to_dict() == config


def test_attentions_that_know_no_positions_stay_apart() -> None:
    family = family_named("smollm3")
    with pytest.raises(SurgeryError, match=r"layers \[2, 3\] cannot be joined .* compute differently"):
        fxfusion.fuse(intact(family), PLAN)


# --- hoisted windows alone ------------------------------------------------------------------------------


@pytest.mark.usefixtures("clean_dynamo")
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


def test_the_nemotron_nas_blocks_of_a_window() -> None:
    model: Any = fxfusion.fuse(llama(), {"groups": [[1, 2, 3]], "hoist": True})
    planned = plan_export(model)
    blocks = planned.config["block_configs"]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, True, True, False]
    assert not any(block["attention"]["no_op"] for block in blocks)
    assert planned.engines["vllm"] is None and planned.engines["mlx-lm"] is None
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
def test_a_window_that_is_refused_leaves_the_model_alone(
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
