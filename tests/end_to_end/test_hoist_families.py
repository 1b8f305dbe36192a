"""Windows of intact models: hoisted and fused by `torch.compile` equals the hoisted form, computed in eager."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion import FusionPlan, ffn_fusion, fuse_graph
from fxfusion.backend import last_reports
from fxfusion.errors import NotFusedError
from tests.end_to_end import families
from tests.end_to_end.caching import decoded, new_cache, token_ids
from tests.end_to_end.eager_hoisted import hoisted, hoisted_by_hand
from tests.end_to_end.families import Family, disturb, make_inputs, relative, run
from tests.end_to_end.family_table import FAST, VARIANTS, family_named
from tests.helpers import assert_exact, capture, rmse

WINDOWS = [[0, 1], [2, 3]]
WIDE = FusionPlan(groups=[{"members": window, "mixers": "wide"} for window in WINDOWS])
QUICK = "llama qwen3 phi3 gemma granite gpt2 opt starcoder2".split()
SLOW = "mistral qwen2 smollm3 glm olmo gpt_neo nemotron stablelm gpt_neox-sequential".split()
PARALLEL = "gpt_neox cohere falcon".split()
RED = 1e-4


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def intact(family: Family, **config: Any) -> nn.Module:
    """The family's random model with all its attention."""
    torch.manual_seed(0)
    changed = Family(**{**_fields(family), "config": {**family.config, **config}})
    model = families.build(changed).to(family.dtype).eval()
    families.randomise(model, 0)
    return model


def _fields(family: Family) -> dict[str, Any]:
    return {name: getattr(family, name) for name in Family.__dataclass_fields__}


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"compiler": "eager", "strict": True, **options}
    return torch.compile(model, backend=ffn_fusion, options=given)


def in_hoisted_form(model: nn.Module, family: Family, inputs: Mapping[str, Any]) -> Tensor:
    with hoisted(model, family, WINDOWS):
        return run(model, inputs)


def named(ids: list[str]) -> list[Family]:
    known = {family.id: family for family in (*FAST, *VARIANTS)}
    return [known[id_] for id_ in ids]


def each(fast: list[str], slow: list[str]) -> Any:
    cases = [pytest.param(family, id=family.id) for family in named(fast)]
    cases += [pytest.param(family, id=family.id, marks=pytest.mark.slow) for family in named(slow)]
    return pytest.mark.parametrize("family", cases)


@each(QUICK, SLOW)
def test_a_hoisted_family_is_fused_exactly(family: Family) -> None:
    model = intact(family)
    inputs = make_inputs(family, model)
    sequential, wanted = run(model, inputs), in_hoisted_form(model, family, inputs)
    assert relative(wanted, sequential) > 0.01, "the hoisted form is too close to tell them apart"
    call = compiled(model, policy={"windows": WINDOWS}, verify="numeric")
    assert relative(run(call, inputs), wanted) <= family.limit
    report = last_reports()[-1]
    assert [len(group.members) for group in report.groups] == [2, 2]
    assert [group.moved for group in report.groups] == [(f"{family.layers}.1",), (f"{family.layers}.3",)]
    disturb(model, family)
    again = run(call, inputs)
    assert relative(again, wanted) > RED, "a changed weight was not noticed"
    assert relative(again, in_hoisted_form(model, family, inputs)) <= family.limit


@torch.no_grad()
def test_the_hoisted_form_written_by_hand_is_the_same() -> None:
    family = family_named("llama")
    model = intact(family)
    inputs = make_inputs(family, model)
    wanted = hoisted_by_hand(model, WINDOWS, inputs["input_ids"])
    assert relative(in_hoisted_form(model, family, inputs), wanted) < 1e-12
    plan = FusionPlan(groups=WINDOWS, hoist=True)
    assert relative(run(compiled(model, plan=plan), inputs), wanted) <= family.limit
    other = run(compiled(model, plan=FusionPlan(groups=WINDOWS[:1], hoist=True)), inputs)
    assert relative(other, wanted) > RED
    assert relative(other, hoisted_by_hand(model, WINDOWS[:1], inputs["input_ids"])) <= family.limit


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_of_a_window(name: str, kind: str) -> None:
    family = family_named(name)
    model = intact(family, use_cache=True)
    ids = token_ids(length=10)
    with hoisted(model, family, WINDOWS):
        wanted = decoded(model, ids, new_cache(kind, model, 10))
        at_once = run(model, {"input_ids": ids, "use_cache": False})
    call = compiled(model, policy={"windows": WINDOWS})
    found = decoded(call, ids, new_cache(kind, model, 10))
    assert relative(found, wanted) <= family.limit and relative(found, at_once) <= 1e-6
    assert relative(wanted, run(model, {"input_ids": ids, "use_cache": False})) > 0.01
    assert {len(report.groups) for report in last_reports()[-2:]} == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    family = family_named("llama")
    exact = intact(family)
    inputs = make_inputs(family, exact)
    truth = in_hoisted_form(exact, family, inputs)
    model = exact.to(dtype)
    wanted = in_hoisted_form(model, family, inputs)
    found = run(compiled(model, policy={"windows": WINDOWS}), inputs)
    if dtype == torch.float32:
        assert_exact(found, wanted, dtype)
        return
    rounded = in_hoisted_form(copy.deepcopy(model).double(), family, inputs)  # the same weights, rounded
    assert_exact(found, wanted, dtype, truth=rounded)
    assert rmse(wanted, truth) > 0


def test_gradients_are_those_of_the_hoisted_form() -> None:
    family = family_named("llama")
    model = intact(family)
    inputs = make_inputs(family, model)
    weights = dict(model.named_parameters())  # the layers are no submodules while they are hoisted
    with hoisted(model, family, WINDOWS):
        wanted = _gradients(model, weights, inputs)
    found = _gradients(compiled(model, policy={"windows": WINDOWS}, compiler="aot_eager"), weights, inputs)
    sequential = _gradients(model, weights, inputs)
    assert wanted.keys() == found.keys() == weights.keys()
    for name, value in wanted.items():
        assert relative(found[name], value) <= 2e-6, name  # the model's norms compute in float32
    assert max(relative(sequential[name], value) for name, value in wanted.items()) > 0.01


def _gradients(call: Any, weights: Mapping[str, nn.Parameter], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    for value in weights.values():
        value.grad = None
    call(**inputs).logits.square().mean().backward()
    return {name: value.grad.clone() for name, value in weights.items() if value.grad is not None}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_wide_window_is_joined_exactly(name: str) -> None:
    """Grouped-query attention, biases, norms on queries and keys, one matrix for all three."""
    family = family_named(name)
    model = intact(family)
    inputs = make_inputs(family, model)
    wanted = hoisted_by_hand(model, WINDOWS, inputs["input_ids"], wide=True)
    assert relative(in_hoisted_form(model, family, inputs), wanted) > 0.01, "the two forms are too close"
    call = compiled(model, plan=WIDE)
    assert relative(run(call, inputs), wanted) <= family.limit
    (passed,) = [found for found in last_reports()[-1].graphs[0].history if found["pass"] == "concat_parallel_mixers"]
    assert passed["changed"] == 2 and not passed["notes"]
    with torch.no_grad():
        families.layers_of(model, family)[1].self_attn.o_proj.weight.mul_(1.01)
    assert relative(run(call, inputs), wanted) > RED, "a changed weight was not noticed"
    changed = hoisted_by_hand(model, WINDOWS, inputs["input_ids"], wide=True)
    assert relative(run(call, inputs), changed) <= family.limit


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_of_a_wide_window(kind: str) -> None:
    family = family_named("llama")
    model = intact(family, use_cache=True)
    ids = token_ids(length=10)
    found = decoded(compiled(model, plan=WIDE), ids, new_cache(kind, model, 10))
    assert relative(found, hoisted_by_hand(model, WINDOWS, ids, wide=True)) <= 1e-6


@pytest.mark.compile
def test_inductor_compiles_a_window() -> None:
    family = family_named("llama")
    model = intact(family).float()
    inputs = make_inputs(family, model)
    wanted = in_hoisted_form(model, family, inputs)
    call = torch.compile(model, backend=ffn_fusion, options={"policy": {"windows": WINDOWS}, "strict": True})
    assert relative(run(call, inputs), wanted) <= 1e-5


def test_a_captured_graph_is_hoisted() -> None:
    family = family_named("llama")
    model = intact(family)
    inputs = make_inputs(family, model)
    captured = capture(model, **inputs)
    fused, report = fuse_graph(captured.module, captured.inputs, policy={"windows": WINDOWS}, verify="numeric")
    found = fused(*captured.inputs)
    assert relative(families.first_tensor(found), in_hoisted_form(model, family, inputs)) <= family.limit
    assert len(report.groups) == 2 and all(proof["passed"] for proof in report.verifications)


@pytest.mark.parametrize("plan", [None, FusionPlan(groups=[[1, 2]])])
def test_nothing_moves_unless_a_window_is_named(plan: FusionPlan | None) -> None:
    family = family_named("llama")
    model = intact(family)
    inputs = make_inputs(family, model)
    plain = run(torch.compile(model, backend="eager"), inputs)
    torch._dynamo.reset()
    call = compiled(model, plan=plan, strict=False)
    assert torch.equal(run(call, inputs), plain)
    assert not last_reports()[-1].groups
    if plan is not None:
        (refusal,) = [found for found in last_reports()[-1].refusals if found.code.value == "plan_unmatched"]
        assert "group 0 [1, 2]" in refusal.message and "hoist" in refusal.message


@each(PARALLEL, [])
def test_parallel_blocks_are_refused_with_their_layers(family: Family) -> None:
    model = intact(family)
    inputs = make_inputs(family, model)
    expected = run(model, inputs)
    with pytest.raises(NotFusedError, match=r"window \[1, 2\]: none of them .*; a window needs layers"):
        run(compiled(model, policy={"windows": [[1, 2]]}), inputs)
    torch._dynamo.reset()
    assert torch.equal(run(compiled(model, policy={"windows": [[1, 2]]}, strict=False), inputs), expected)
