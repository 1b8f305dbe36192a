"""choose_form: one rule, with its reason; what does not pay is left alone where the policy says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.compiler.pipeline import analyse
from fxfusion.errors import RefusalCode
from fxfusion.graph.effects import records_gradients
from fxfusion.passes import choose_form
from fxfusion.passes.choose_form import Target, choose_forms, tokens_to_pack_for
from fxfusion.passes.ffn import Group, Window
from fxfusion.plan.groups import PlannedGroup
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import HIDDEN, Rms, capture, stack, tokens
from tests.passes.output_norms import post_stack


def group_of(dtype: torch.dtype = torch.float32, seq: int = 4) -> Group:
    model, x = stack().to(dtype), tokens(seq=seq).to(dtype)
    (group,) = analyse(capture(model, x), FusionPolicy()).groups
    return group


def chosen(group: Group, **setting: Any) -> tuple[str, str]:
    ((found,), _) = choose_forms([group], Target(**setting), profitable_only=False)
    return found.end.form_name(found.form), found.why


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of the size of a test count as large, on a processor whose oneDNN packs what the rule was measured for."""
    monkeypatch.setattr(choose_form, "SMALL", 0)
    monkeypatch.setattr(choose_form.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(choose_form, "onednn_packs", lambda dtype: dtype in (torch.float32, torch.bfloat16))


class Autocasting(nn.Module):
    """A stack inside autocast regions, outermost first."""

    def __init__(self, regions: Sequence[tuple[str, bool]], before: bool) -> None:
        super().__init__()
        self.inner, self.regions, self.before = stack().float(), regions, before

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.regions)

    def run(self, x: Tensor, regions: Sequence[tuple[str, bool]]) -> Tensor:
        if not regions:
            return x.clone() if self.before else self.inner(x)
        (device, enabled), *inside = regions
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            x = self.run(x, inside)
        return self.inner(x) if self.before else x


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize(
    ("regions", "before", "on"),
    [
        ([("cpu", True)], False, True),
        ([("cpu", False)], False, False),
        ([("cpu", True), ("cpu", False)], False, False),
        ([("cpu", False), ("cpu", True)], False, True),
        ([("cpu", True)], True, None),
        ([], False, None),
    ],
)
def test_autocast_counts_where_the_group_is(regions: Any, before: bool, on: bool | None, ambient: bool) -> None:
    """oneDNN's layout would not cast. `on`: None where what is around the graph decides."""
    model, x = Autocasting(regions, before), tokens(seq=4).float()
    (group,) = analyse(capture(model, x), FusionPolicy()).groups
    form, why = chosen(group, autocast=ambient)
    is_on = ambient if on is None else on
    assert (form == "concatenated") == is_on and ("autocast is on" in why) == is_on
    form, why = chosen(group, autocast=ambient, request="prepacked")
    assert form == ("concatenated" if is_on else "prepacked")


def grouped_of(dtype: torch.dtype = torch.float32, seq: int = 4) -> Group:
    model, x = post_stack(norm=Rms).to(dtype), tokens(seq=seq).to(dtype)
    (group,) = analyse(capture(model, x), FusionPolicy()).groups
    assert group.end.no_module
    return group


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("group", "dtype", "seq", "setting", "form", "why"),
    [
        (group_of, torch.bfloat16, 4, {}, "prepacked", "fastest for bfloat16"),
        (group_of, torch.float32, 4, {}, "prepacked", "fastest for float32"),
        (group_of, torch.float32, 64, {"autocast": True}, "members", "autocast is on"),
        (group_of, torch.float64, 64, {}, "concatenated", "oneDNN packs no float64 weights here"),
        (group_of, torch.float64, 4, {"request": "prepacked"}, "concatenated", "prepacked was asked for, but "),
        (group_of, torch.float32, 4, {"request": "concatenated"}, "concatenated", "asked for"),
        (group_of, torch.float32, 4, {"request": "members"}, "members", "asked for"),
        (grouped_of, torch.bfloat16, 64, {}, "grouped_prepacked", "fastest for bfloat16"),
        (grouped_of, torch.float32, 1, {}, "grouped_prepacked", "fastest for float32"),
        (grouped_of, torch.float32, 64, {"training": True}, "members", "gradients are recorded"),
        (grouped_of, torch.float32, 64, {"autocast": True}, "members", "float32 GEMMs of 16 tokens"),
        (grouped_of, torch.float32, 1, {"autocast": True}, "grouped", "autocast is on"),
        (grouped_of, torch.bfloat16, 64, {"request": "concatenated", "training": True}, "grouped", "at each call"),
        (grouped_of, torch.bfloat16, 64, {"request": "concatenated"}, "grouped", "asked for"),
        (grouped_of, torch.bfloat16, 64, {"request": "prepacked"}, "grouped_prepacked", "asked for"),
        (grouped_of, torch.bfloat16, 64, {"request": "prepacked", "training": True}, "members", "was asked for, but"),
        (grouped_of, torch.bfloat16, 64, {"request": "members"}, "members", "asked for"),
    ],
)
def test_the_rule(
    group: Callable[..., Group], dtype: torch.dtype, seq: int, setting: dict[str, Any], form: str, why: str
) -> None:
    found, words = chosen(group(dtype, seq), **setting)
    assert found == form and why in words


@pytest.mark.parametrize(("group", "form"), [(group_of, "concatenated"), (grouped_of, "grouped")])
def test_small_groups_are_wide(group: Callable[..., Group], form: str) -> None:
    assert chosen(group()) == (form, "small: fewer calls are all that counts")


@pytest.mark.usefixtures("large")
def test_other_processors_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_form.platform, "machine", lambda: "aarch64")
    assert chosen(group_of(torch.bfloat16)) == (
        "concatenated",
        "fewer and larger GEMMs; oneDNN's layouts were measured on x86 processors only",
    )


def test_other_devices_keep_the_default() -> None:
    with torch.device("meta"):
        model, x = stack(), torch.empty(1, 4, HIDDEN, dtype=torch.float64)
    (group,) = analyse(capture(model, x), FusionPolicy()).groups
    assert chosen(group) == ("concatenated", "the default; not measured on meta")


RECORDED = "gradients are recorded: computed from the model's own parameters"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("request_", "form", "why"),
    [
        ("auto", "members", RECORDED),
        ("prepacked", "members", f"prepacked was asked for, but {RECORDED}"),
        ("members", "members", "asked for"),
        ("concatenated", "concatenated", "asked for; gradients are recorded, so at each call"),
    ],
)
def test_nothing_is_packed_while_gradients_are_recorded(dtype: torch.dtype, request_: str, form: str, why: str) -> None:
    assert chosen(group_of(dtype), request=request_, training=True) == (form, why)


def _inside(model: nn.Module, record: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: torch.Tensor) -> Any:
        return record(lambda y: model(y).sum(), x)

    return forward


def _with_grad(function: Callable[..., Any], x: torch.Tensor) -> Any:
    with torch.enable_grad():
        return function(x)


def _without(function: Callable[..., Any], x: torch.Tensor) -> Any:
    with torch.no_grad():
        return function(x)


RECORDS: list[tuple[Callable[..., Any], bool]] = [
    (_with_grad, True),
    (lambda function, x: torch.func.grad(function)(x), True),
    (lambda function, x: torch.func.vjp(function, x)[0], True),
    (lambda function, x: torch.func.jvp(function, (x,), (x,))[1], True),
    (_without, False),
    (lambda function, x: function(x), False),
]


@pytest.mark.parametrize(("record", "wanted"), RECORDS)
def test_graphs_that_record_gradients_themselves(record: Callable[..., Any], wanted: bool) -> None:
    found: list[bool] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(records_gradients(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(_inside(stack(), record), backend=backend, fullgraph=True)(tokens())
    assert found == [wanted]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("training", [True, False])
def test_profitable_only_does_not_depend_on_gradients(training: bool) -> None:
    """Otherwise a model would train another function than it computes later."""
    groups, _ = choose_forms([group_of(torch.float32)], Target(training=training), profitable_only=True)
    assert len(groups) == 1
    groups, refusals = choose_forms(
        [group_of(torch.float32, seq=64)], Target(training=training, autocast=True), profitable_only=True
    )
    assert groups == () and "autocast is on" in refusals[0].message


def test_the_layout_does_not_depend_on_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All graphs of a model share one copy of the packed weights."""
    assert {tokens_to_pack_for(group_of(seq=seq)) for seq in (1, 64)} == {16}
    monkeypatch.setattr(choose_form, "CACHE", 0)
    assert {tokens_to_pack_for(group_of(seq=seq)) for seq in (1, 64)} == {1}
    assert tokens_to_pack_for(group_of(torch.bfloat16)) == 16


@pytest.mark.parametrize("group", [group_of, grouped_of])
def test_profitable_only_leaves_a_group_sequential(group: Callable[..., Group]) -> None:
    groups, refusals = choose_forms([group()], Target(request="members"), profitable_only=True)
    assert groups == () and {refusal.code for refusal in refusals} == {RefusalCode.NOT_PROFITABLE}
    assert len(refusals) == len(group().members)
    groups, refusals = choose_forms([group()], Target(request="concatenated"), profitable_only=True)
    assert len(groups) == 1 and refusals == ()


def test_the_group_of_a_window_stays_since_its_mixers_have_moved() -> None:
    window = Window(names=PlannedGroup([0, 1], "hoist"), members=(), mixers=(), entry=())
    group = replace(group_of(), window=window)
    groups, refusals = choose_forms([group, group_of()], Target(request="members"), profitable_only=True)
    assert [one.window for one in groups] == [window] and len(refusals) == len(group.members)


@pytest.mark.parametrize("profitable_only", [True, False])
def test_profitable_only_through_the_backend(profitable_only: bool) -> None:
    """Sequential where it is True, the parallel form where it is False: two different functions."""
    torch._dynamo.reset()
    model, x = stack().float(), tokens().float()
    options = {"policy": {"profitable_only": profitable_only}, "form": "members", "compiler": "eager", "strict": True}
    with torch.no_grad():
        result = torch.compile(model, backend=fxfusion.ffn_fusion, options=options)(x)
        sequential = torch.allclose(result, model(x), rtol=1e-5, atol=1e-6)
    assert sequential is profitable_only
    report = fxfusion.last_reports()[-1]
    assert len(report.groups) == (0 if profitable_only else 1)
    assert ("not_profitable" in str(report)) is profitable_only
    assert ("members (asked for)" in str(report)) is not profitable_only


def test_explain_says_what_the_backend_would_choose() -> None:
    model: nn.Module = stack()
    (group,) = fxfusion.explain(model, tokens()).groups
    assert (group.form, group.why) == ("concatenated", "small: fewer calls are all that counts")
