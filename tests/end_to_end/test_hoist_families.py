"""Windows of intact models: hoisted and fused by `torch.compile` equals the hoisted form, computed in eager.

Where a norm stands on the FFN's output, each member keeps its own: gate and up are one matrix then, down is not.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion import FusionPlan, ffn_fusion
from fxfusion.backend import last_reports
from fxfusion.errors import NotFusedError
from tests.end_to_end import families
from tests.end_to_end.caching import decoded, new_cache, token_ids
from tests.end_to_end.eager_hoisted import hoisted, hoisted_by_hand
from tests.end_to_end.families import Family, disturb, layers_of, make_inputs, relative, run
from tests.end_to_end.family_table import OUTPUT_NORM, OUTPUT_NORM_SLOW, each, family_named, named
from tests.helpers import assert_exact

pytestmark = pytest.mark.usefixtures("clean_dynamo")

WINDOWS = [[0, 1], [2, 3]]
WIDE = FusionPlan(groups=[{"members": window, "mixers": "wide"} for window in WINDOWS])
QUICK = "llama qwen3 phi3 gemma granite gpt2 opt starcoder2 olmo2 gemma2".split()
SLOW = "mistral qwen2 smollm3 glm olmo gpt_neo nemotron stablelm gpt_neox-sequential".split()
SLOW += "glm4 olmo3 exaone4 gemma3_text lfm3 bitnet apertus".split()
GROUPED = (*OUTPUT_NORM, *OUTPUT_NORM_SLOW)
PARALLEL = "gpt_neox cohere falcon".split()
RED = 1e-4
CACHED = 1e-6  # norms in float32 see other sums when tokens come one by one


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


@each(named(QUICK), named(SLOW))
def test_a_hoisted_family_is_fused_exactly(family: Family) -> None:
    model = intact(family)
    inputs = make_inputs(family, model)
    sequential, wanted = run(model, inputs), in_hoisted_form(model, family, inputs)
    assert relative(wanted, sequential) > 0.01, "the hoisted form is too close to tell them apart"
    call = compiled(model, policy={"windows": WINDOWS}, verify="numeric")
    assert relative(run(call, inputs), wanted) <= family.limit
    report = last_reports()[-1]
    form = "grouped" if family in GROUPED else "concatenated"
    assert [(len(group.members), group.form) for group in report.groups] == [(2, form)] * 2
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


def cached(family: Family, kind: str, wide: bool) -> Any:
    quick = (family.id, kind, wide) in (
        ("llama", "dynamic", True),
        ("olmo2", "static", True),
        ("gemma2", "dynamic", False),
    )
    marks = () if quick else pytest.mark.slow
    return pytest.param(family, kind, wide, id=f"{family.id}-{kind}-{'wide' if wide else 'hoist'}", marks=marks)


CACHED_CASES = [
    cached(*case)
    for case in itertools.product([*named(["llama", "gpt2"]), *GROUPED], ("dynamic", "static"), (False, True))
]


@pytest.mark.parametrize(("family", "kind", "wide"), CACHED_CASES)
def test_cached_decoding(family: Family, kind: str, wide: bool) -> None:
    """Keys and values that read the stream itself, with no norm before them, reach a static cache by a write alone."""
    model = intact(family, use_cache=True)
    ids = token_ids(length=10)
    with hoisted(model, family, WINDOWS, wide=wide):
        wanted = decoded(model, ids, new_cache(kind, model, 10))
        at_once = run(model, {"input_ids": ids, "use_cache": False})
    with hoisted(model, family, WINDOWS, wide=not wide):
        other = decoded(model, ids, new_cache(kind, model, 10))
    plan = WIDE if wide else FusionPlan(groups=WINDOWS, hoist=True)
    found = decoded(compiled(model, plan=plan), ids, new_cache(kind, model, 10))
    assert relative(found, wanted) <= family.limit and relative(found, at_once) <= CACHED
    assert relative(wanted, other) > 0.01, "the two forms are too close to tell them apart"
    assert {len(report.groups) for report in last_reports()[-2:]} == {2}


@each(named(["olmo2", "gemma2"]), named(["glm4"]))
def test_a_wide_window_reads_one_stream_and_keeps_its_projections_apart(family: Family) -> None:
    """A norm of a sum is no sum of norms: their last projections cannot be one. The report names the layers."""
    model = intact(family)
    inputs = make_inputs(family, model)
    with hoisted(model, family, WINDOWS, wide=True):
        wanted = run(model, inputs)
    with hoisted(model, family, WINDOWS):
        assert relative(wanted, run(model, inputs)) > 0.01, "the two forms are too close to tell them apart"
    assert relative(run(compiled(model, plan=WIDE), inputs), wanted) <= family.limit
    notes = [found for found in last_reports()[-1].refusals if "projections of its window stay apart" in found.message]
    assert [found.layer for found in notes] == [f"{family.layers}.{first}" for first, _ in WINDOWS]
    assert all(f"{found.layer} does not end with a linear layer but with" in found.message for found in notes)


def test_half_precision() -> None:
    family = family_named("llama")
    model = intact(family).bfloat16()
    inputs = make_inputs(family, model)
    wanted, truth = (in_hoisted_form(made, family, inputs) for made in (model, copy.deepcopy(model).double()))
    found = run(compiled(model, policy={"windows": WINDOWS}), inputs)
    assert_exact(found, wanted, torch.bfloat16, truth=truth)


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


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["hoist", "wide"])
@pytest.mark.parametrize("name", ["gemma2", "llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_norm_of_the_last_member_serves_all(name: str, wide: bool) -> None:
    """Those before the projections; members keep their own norms behind them."""
    family = family_named(name)
    model = intact(family)
    inputs = make_inputs(family, model)
    with hoisted(model, family, WINDOWS, wide=wide):
        own = run(model, inputs)
    with hoisted(model, family, WINDOWS, wide=wide, last_norm=True):
        wanted = run(model, inputs)
    assert relative(wanted, own) > 0.01, "the two norms' hoisted forms are too close to tell them apart"
    groups = [{"members": window, "mixers": "wide" if wide else "hoist"} for window in WINDOWS]
    call = compiled(model, plan=FusionPlan(groups=groups, norm="last"), verify="numeric")
    assert relative(run(call, inputs), wanted) <= family.limit
    with torch.no_grad():  # the last member's norm counts, the first one's does not
        first, last = (layers_of(model, family)[number].get_submodule(family.ffn_norm) for number in WINDOWS[0])
        first.weight.add_(0.5)
        assert relative(run(call, inputs), wanted) <= family.limit
        last.weight.add_(0.5)
    assert relative(run(call, inputs), wanted) > RED, "a changed norm was not noticed"


@pytest.mark.compile
def test_inductor_compiles_a_window() -> None:
    family = family_named("llama")
    model = intact(family).float()
    inputs = make_inputs(family, model)
    wanted = in_hoisted_form(model, family, inputs)
    call = torch.compile(model, backend=ffn_fusion, options={"policy": {"windows": WINDOWS}, "strict": True})
    assert relative(run(call, inputs), wanted) <= 1e-5


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


@each(named(PARALLEL))
def test_parallel_blocks_are_refused_with_their_layers(family: Family) -> None:
    model = intact(family)
    inputs = make_inputs(family, model)
    expected = run(model, inputs)
    with pytest.raises(NotFusedError, match=r"window \[1, 2\]: none of them .*; a window needs layers"):
        run(compiled(model, policy={"windows": [[1, 2]]}), inputs)
    torch._dynamo.reset()
    assert torch.equal(run(compiled(model, policy={"windows": [[1, 2]]}, strict=False), inputs), expected)
