"""fuse: what goes, what follows, what is refused, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.errors import CheckpointError, PlanError, SurgeryError
from fxfusion.models.ffn_surgery import fuse as module
from fxfusion.models.ffn_surgery.proof import ParallelForm
from fxfusion.models.ffn_surgery.record import fused_state, intact_config, plan_of
from fxfusion.models.fingerprint import facts_of
from tests.end_to_end.caching import LIMIT, RED, decoded, decoder, new_cache, off, recomputed, token_ids
from tests.end_to_end.families import relative
from tests.end_to_end.family_table import family_named
from tests.fxfusion.models.odd_decoder import odd_decoder

PLAN = {"dropped_attention": [1, 2], "groups": [[0, 1, 2]]}


@lru_cache
def _llama() -> Any:
    return decoder(family_named("llama"))


def llama() -> Any:
    """A random Llama of four layers with all its attention; a copy of its own for each test."""
    return copy.deepcopy(_llama())


def logits(model: nn.Module) -> Tensor:
    return recomputed(model, token_ids())


def snapshot(model: Any) -> tuple[Any, ...]:
    sizes = [repr(part) for part in model.modules()]
    return sizes, {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()


def assert_same(model: Any, before: tuple[Any, ...]) -> None:
    sizes, weights, config = snapshot(model)
    assert sizes == before[0] and config == before[2] and list(weights) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in weights.items())


def test_attention_goes_first_then_the_members() -> None:
    model = llama()
    assert fxfusion.fuse(model, PLAN) is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    gate = model.model.layers[0].mlp.gate_proj
    assert type(gate) is nn.Linear and (gate.in_features, gate.out_features) == (32, 144) == gate.weight.shape[::-1]
    assert model.model.layers[0].mlp.intermediate_size == 144
    assert torch.equal(model.model.layers[0].post_attention_layernorm.weight, torch.ones(32, dtype=gate.weight.dtype))
    assert model.config.fxfusion["fused"] == {"groups": [[0, 1, 2]], "norm": "fold", "layers": 4, "kept": [0, 3]}
    assert model.config.fxfusion["dropped_attention"] == [1, 2]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_is_right(kind: str) -> None:
    model, ids = fxfusion.fuse(llama(), PLAN), token_ids()
    cache = new_cache(kind, model)
    assert len(cache.layers) == 2
    found, wanted = decoded(model, ids, cache), recomputed(model, ids)
    assert off(found, wanted) <= LIMIT
    assert off(decoded(model, ids.flip(1), new_cache(kind, model)), wanted) > RED, "other tokens were not noticed"


def test_generate_writes_what_recomputing_would() -> None:
    model, ids = fxfusion.fuse(llama(), PLAN), token_ids()[:1]
    written = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    slowly = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(written, slowly)


def test_several_groups_and_a_group_that_begins_where_another_ends() -> None:
    model = llama()
    fxfusion.drop_attention(model, [1, 2, 3])
    plain = copy.deepcopy(model)
    fxfusion.fuse(model, {"dropped_attention": [1, 2, 3], "groups": [[0, 1], [2, 3]]})
    assert len(model.model.layers) == 2
    from fxfusion.analysis.planned import PlannedModel
    from fxfusion.models.traced import TracedModel

    planned = PlannedModel(TracedModel(plain), fxfusion.FusionPlan(groups=[[0, 1], [2, 3]]))
    assert relative(logits(model), planned(token_ids())) <= 1e-5


def test_members_by_module_path() -> None:
    model = llama()
    fxfusion.drop_attention(model, [2])
    fxfusion.fuse(model, {"groups": [["model.layers.1.mlp", "model.layers.2.mlp"]]})
    assert model.config.fxfusion["fused"]["kept"] == [0, 1, 3]


def test_the_members_weights_are_freed() -> None:
    model = llama()
    gone = weakref.ref(model.model.layers[2].mlp.gate_proj.weight)
    home = weakref.ref(model.model.layers[0].mlp.gate_proj.weight)
    fxfusion.fuse(model, PLAN)
    gc.collect()
    assert gone() is None and home() is None


def test_requires_grad_stays_as_it_was() -> None:
    model = llama()
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    fxfusion.fuse(model, PLAN)
    first = model.model.layers[0].mlp
    assert not first.gate_proj.weight.requires_grad and first.up_proj.weight.requires_grad


def test_a_copy_can_be_unfused_and_is_independent() -> None:
    model = fxfusion.fuse(llama(), PLAN)
    other = copy.deepcopy(model)
    before = logits(model)
    fxfusion.unfuse(other)
    assert len(other.model.layers) == 4 and len(model.model.layers) == 2
    assert torch.equal(logits(model), before)


def test_plan_and_facts_of_a_fused_model() -> None:
    model = llama()
    facts = facts_of(model)
    config = copy.deepcopy(model.config.to_dict())
    fxfusion.fuse(model, PLAN)
    plan = plan_of(model)
    assert (plan.dropped_attention, plan.groups, plan.norm) == ((1, 2), ((0, 1, 2),), "fold")
    assert facts_of(model).model_copy(update={"tensors": facts.tensors}) == facts
    assert intact_config(model).to_dict() == config


def test_a_model_on_the_meta_device() -> None:
    intact = _llama()  # made once, and not on the meta device
    with torch.device("meta"):
        model = type(intact)(copy.deepcopy(intact.config))
    fxfusion.fuse(model, PLAN)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 144)
    assert all(value.is_meta for value in model.parameters())
    state = fused_state(model)
    assert state is not None and set(state.shells) == {1, 2}
    fxfusion.unfuse(model)
    assert len(model.model.layers) == 4 and model.model.layers[1].mlp.down_proj.weight.shape == (32, 48)


def test_a_failure_on_the_meta_device_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = _llama()  # made once, and not on the meta device
    with torch.device("meta"):
        model = type(intact)(copy.deepcopy(intact.config))
    before = [repr(part) for part in model.modules()], model.config.to_dict()

    def fail(*_: Any) -> None:
        raise SurgeryError("widths differ")

    monkeypatch.setattr(module, "check_widths", fail)
    with pytest.raises(SurgeryError, match="widths differ"):
        fxfusion.fuse(model, {"groups": [[1, 2]], "hoist": True})
    assert ([repr(part) for part in model.modules()], model.config.to_dict()) == before


@pytest.mark.parametrize("plan", [PLAN, {"groups": [[1, 2]], "hoist": True}], ids=["run", "window"])
def test_members_come_back_in_the_mode_of_the_model(plan: dict[str, Any]) -> None:
    model = llama().train()
    fxfusion.fuse(model, plan).eval()
    fxfusion.unfuse(model)
    assert not [name for name, part in model.named_modules() if part.training]


def test_only_attention_to_drop() -> None:
    model = fxfusion.fuse(llama(), {"dropped_attention": [1]})
    assert len(model.model.layers) == 4 and "fused" not in model.config.fxfusion


@pytest.mark.parametrize(
    ("plan", "error", "why"),
    [
        ({"groups": [[1, 2]]}, PlanError, "1 is in no chain"),
        ({"dropped_attention": [2], "groups": [[1, 2, 3]]}, PlanError, "3 is in no chain"),
        ({"dropped_attention": [2], "groups": [[1, 9]]}, PlanError, "layer 9 does not exist"),
        ({"dropped_attention": [7]}, PlanError, "layer 7 does not exist"),
        ({"groups": [["model.layers.7.mlp", "model.layers.8.mlp"]]}, PlanError, "none of them holds an FFN"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan: dict[str, Any], error: type[Exception], why: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=why):
        fxfusion.fuse(model, plan)
    assert_same(model, before)


def test_a_fused_model_is_neither_fused_again_nor_loses_attention() -> None:
    model = fxfusion.fuse(llama(), PLAN)
    with pytest.raises(SurgeryError, match="fused already"):
        fxfusion.fuse(model, PLAN)
    with pytest.raises(SurgeryError, match="unfuse"):
        fxfusion.drop_attention(model, [3])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("olmo2", "a norm stands on the FFN's output"),
        ("gemma2", "on the FFN's output"),
        ("bitnet", "inside of the FFN"),
    ],
)
def test_what_no_wider_module_computes_is_left_to_the_backend(name: str, words: str, tmp_path: Path) -> None:
    model = decoder(family_named(name))
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=rf"layers.0.mlp: .*{words}.*backend=fxfusion.ffn_fusion"):
        fxfusion.fuse(model, PLAN)
    assert_same(model, before)
    with pytest.raises(SurgeryError, match="backend=fxfusion.ffn_fusion"):
        fxfusion.save_pretrained(model, tmp_path / "folder", plan=PLAN)
    assert_same(model, before)
    assert not (tmp_path / "folder").exists()


def test_no_transformers_model() -> None:
    with pytest.raises((PlanError, SurgeryError)):
        fxfusion.fuse(nn.Linear(3, 3), {"groups": [[0, 1]]})


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_proof_takes_everything_back(monkeypatch: pytest.MonkeyPatch, failing: int, norm: str) -> None:
    """Attention too, and groups that were finished before: every bit, in the same modules, with their hooks."""
    model = llama()
    modules, seen = dict(model.named_modules()), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    before, config = logits(model), model.config.to_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    check = ParallelForm.check

    def fail(self: ParallelForm, model: nn.Module, groups: int) -> float:
        if groups == failing:
            raise SurgeryError("the proof fails here")
        return check(self, model, groups)

    monkeypatch.setattr(ParallelForm, "check", fail)
    with pytest.raises(SurgeryError, match="the proof fails here"):
        fxfusion.fuse(model, {"dropped_attention": [1, 2, 3], "groups": [[0, 1], [2, 3]], "norm": norm})
    assert model.config.to_dict() == config and len(model.model.layers) == 4
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    seen.clear()
    assert torch.equal(logits(model), before) and seen
    with pytest.raises(SurgeryError, match="is not fused"):
        fxfusion.unfuse(model)


def test_a_disk_that_does_not_take_the_copies_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SurgeryError, match="cannot be kept on disk.*No space left"):
        fxfusion.fuse(model, PLAN)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("part", ["", "model.layers.2.mlp"])
def test_offloaded_models_are_refused_by_the_weight_that_is_not_there(part: str, tmp_path: Path) -> None:
    """Weights on the meta device until their module is called, as accelerate's hooks keep them."""
    import accelerate

    model = llama()
    accelerate.cpu_offload(model if not part else model.get_submodule(part), torch.device("cpu"))
    words = r"weights are not there \(model\..*weight is on the meta device: offloaded\?\)"
    with pytest.raises(SurgeryError, match=words):
        fxfusion.fuse(model, PLAN)
    with pytest.raises(SurgeryError, match=words):
        fxfusion.drop_attention(model, [1])
    with pytest.raises(CheckpointError, match=words):
        fxfusion.save_pretrained(model, tmp_path / "folder", "nemotron-nas")
    with pytest.raises(CheckpointError, match="is on the meta device"):
        fxfusion.save_pretrained(model, tmp_path / "folder")
    assert any("is on the meta device: offloaded?" in note for note in fxfusion.explain(model, token_ids()).notes)


def test_the_proof_notices_a_lost_member(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = module.GroupRecipe.pack

    def lossy(self: Any, tensors: Any) -> Any:
        for name, value in pack(self, tensors):
            if "down_proj" in name:
                value[:, -1] = 0.0
            yield name, value

    monkeypatch.setattr(module.GroupRecipe, "pack", lossy)
    with pytest.raises(SurgeryError, match="logits are off"):
        fxfusion.fuse(llama(), PLAN)


def test_hand_written_decoders_fuse_too() -> None:
    model = odd_decoder()
    fxfusion.fuse(model, PLAN)
    assert len(model.blocks) == 2 and model.blocks[1].mix.layer_idx == 1
    assert off(decoded(model, token_ids(), new_cache("dynamic", model)), recomputed(model, token_ids())) <= LIMIT


def test_hooks_on_a_layer_that_goes_are_not_lost_unsaid() -> None:
    model = llama()
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=r"layers.2.mlp has hooks"):
        fxfusion.fuse(model, PLAN)
    assert_same(model, before)
    handle.remove()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert len(fxfusion.fuse(model, PLAN).model.layers) == 2


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_what_rounding_allows_does_not_hang_on_one_small_error(dtype: torch.dtype, allowed: float) -> None:
    exact = torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 3, 8)
    form = ParallelForm(torch.zeros(1, 3, dtype=torch.int64), (exact,), (allowed / 10,))

    class Off(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, input_ids: torch.Tensor) -> Tensor:
            return (exact + self.by * exact.flip(-1)).to(dtype)

    assert form.check(Off(allowed / 6), 0) <= allowed
    with pytest.raises(SurgeryError, match="logits are off by"):
        form.check(Off(3 * allowed), 0)


@pytest.mark.slow  # fuses twice
def test_what_stands_in_is_tried_again_where_layers_are_gone_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi3 has dropout on what its FFN returns, so the first that is tried, a number, is refused: layers 1 and 2 were
    one by then, and 3 had the number 2."""
    plan = {"dropped_attention": [2], "groups": [[1, 2], {"members": [3, 4], "mixers": "hoist"}]}
    model = decoder(family_named("phi3"), num_hidden_layers=5)
    before, text, ids = copy.deepcopy(model), str(model), token_ids()
    groups: list[int] = []
    check = ParallelForm.check

    def failing(self: ParallelForm, model: nn.Module, done: int) -> None:
        groups.append(done)
        check(self, model, done)
        if done == 2:
            raise SurgeryError("off")

    with monkeypatch.context() as patched:
        patched.setattr(ParallelForm, "check", failing)
        with pytest.raises(
            SurgeryError, match=r"layers.3.mlp; tried 0: TypeError: dropout.*; zeros: SurgeryError: off"
        ):
            fxfusion.fuse(model, plan)
    assert groups[:3] == [1, 2, 2] and str(model) == text
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    fxfusion.fuse(model, plan)
    layers = model.model.layers
    assert [type(layer.mlp).__name__ for layer in layers] == ["Phi3MLP", "Phi3MLP", "NoFfn", "Phi3MLP"]
    fxfusion.unfuse(model)
    wanted = fxfusion.drop_attention(before, [2])
    with torch.no_grad():
        assert off(model(ids).logits, wanted(ids).logits) <= LIMIT
