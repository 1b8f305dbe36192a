"""Each form keeps every promise of the backend: the same function, never stale, gradients, shapes, modes, memory."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.compiler.packing import live_packs
from fxfusion.graph.prepacked import _by_address
from tests.fxfusion.compiler.test_packing import _assign, _copy, _data, _data_twice, _load, _mul
from tests.helpers import Rms, assert_exact, parallel_form, stack, tokens
from tests.passes.output_norms import post_stack

FORMS = ("concatenated", "prepacked", "members")


pytestmark = pytest.mark.usefixtures("clean_dynamo")


def compiled(model: nn.Module, form: str, compiler: str = "eager", **options: Any) -> Any:
    given = {"compiler": compiler, "strict": True, "form": form, **options}
    return torch.compile(model, backend=fxfusion.ffn_fusion, options=given)


def form_used() -> str:
    return fxfusion.last_reports()[-1].groups[0].form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_parallel_form_at_every_length(form: str, mode: Any) -> None:
    model = stack().float()
    run = compiled(model, form)
    with mode():
        for length in (1, 3, 40, 9):
            x = tokens(seq=length).float()
            assert_exact(run(x), parallel_form(model, x), torch.float32)
    assert form_used() == form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [_copy, _load, _assign, _data, _data_twice, _mul])
def test_never_stale(form: str, change: Any) -> None:
    model, x = stack().float(), tokens().float()
    run = compiled(model, form)
    with torch.no_grad():
        before = run(x)
        change(model)
        after = parallel_form(model, x)
        assert not torch.allclose(before, after, rtol=1e-3)
        assert_exact(run(x), after, torch.float32)
    assert form_used() == form


GROUPED = {"concatenated": "grouped", "prepacked": "grouped_prepacked", "members": "members"}


@pytest.mark.parametrize("form", FORMS)
def test_norms_on_outputs_in_every_form(form: str) -> None:
    """The parallel form at every length, never stale; gradients where they are recorded."""
    model = post_stack(norm=Rms).float()
    run = compiled(model, form, "aot_eager")
    with torch.no_grad():
        for length in (1, 3, 40, 9):
            x = tokens(seq=length).float()
            assert_exact(run(x), parallel_form(model, x), torch.float32)
        assert form_used() == GROUPED[form]
        before = run(x)
        for name in ("output.weight", "ffn.down.weight", "ffn.gate.weight", "norm.weight"):
            model.layers[1].get_parameter(name).mul_(1.5)
            assert not torch.allclose(before, parallel_form(model, x), rtol=1e-3)
            assert_exact(run(x), parallel_form(model, x), torch.float32)
    other = copy.deepcopy(model)
    run(x).square().mean().backward()
    parallel_form(other, x).square().mean().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    assert form_used() == ("grouped" if form == "concatenated" else "members")


def test_prepacked_gives_way_while_gradients_are_recorded() -> None:
    model, x = stack().float(), tokens().float()
    run = compiled(model, "prepacked", "aot_eager")
    run(x).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    group = fxfusion.last_reports()[-1].groups[0]
    assert group.form == "members" and group.why.startswith("prepacked was asked for, but gradients are recorded")
    with torch.no_grad():
        assert_exact(run(x), parallel_form(model, x), torch.float32)
    assert form_used() == "prepacked"


def test_an_input_that_needs_a_gradient_counts() -> None:
    model, x = stack().float().requires_grad_(False), tokens().float().requires_grad_(True)
    compiled(model, "prepacked", "aot_eager")(x).mean().backward()
    assert x.grad is not None and form_used() == "members"


@pytest.mark.parametrize("form", FORMS)
def test_recompiles_add_no_memory(form: str) -> None:
    """Static shapes: one graph for each length, one copy of the packed weights for all, freed with the model."""
    packs, packed = live_packs(), len(_by_address)
    model = stack().float()
    run = torch.compile(
        model, backend=fxfusion.ffn_fusion, dynamic=False, options={"form": form, "compiler": "eager", "strict": True}
    )
    with torch.no_grad():
        for length in (1, 2, 3):
            run(tokens(seq=length).float())
            assert live_packs() - packs == (form != "members")
            assert len(_by_address) - packed == (3 if form == "prepacked" else 0)
        model.layers[0].ffn.down.weight.mul_(1.1)
        run(tokens(seq=1).float())
        assert len(_by_address) - packed == (3 if form == "prepacked" else 0), "the stale copy is gone"
    del run, model
    torch._dynamo.reset()
    gc.collect()
    assert live_packs() == packs and len(_by_address) == packed


@pytest.mark.compile
@pytest.mark.parametrize("form", ["prepacked", "members"])
def test_with_inductor_and_dynamic_shapes(form: str) -> None:
    model = stack().float()
    run = compiled(model, form, "inductor")
    with torch.no_grad():
        for length in (4, 6, 11):
            x = tokens(seq=length).float()
            assert_exact(run(x), parallel_form(model, x), torch.float32)
    assert form_used() == form


def test_autocast_keeps_its_meaning() -> None:
    model, x = stack().float(), tokens().float()
    run = compiled(model, "prepacked", "aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(x)
    assert form_used() == "concatenated"
    torch.testing.assert_close(result.float(), parallel_form(model, x), rtol=3e-2, atol=3e-2)
