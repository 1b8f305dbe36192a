"""no_attention: a stub returns what the attention returned, with nothing in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion.errors import SurgeryError
from fxfusion.models.no_attention import NoAttention, NoNorm, Nothing, Returned, candidates, watch


class Calls(nn.Module):
    """A module whose forward is given."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.weight, self.result = nn.Parameter(torch.ones(3)), result
        self.window, self.kind, self.is_causal, self._hidden, self.scale = 4, "full", True, 1, None
        self.sizes = [1, 2]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.result(*args, **kwargs)


class Caller(nn.Module):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.inner, self.unused = Calls(result), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x[..., :1], hidden=x, mask=None, residual=x + 1)


X = torch.randn(2, 5, 3)


def returned(result: Any) -> Returned:
    model = Caller(result)
    return watch(model, ["inner"], lambda: model(X))["inner"]


@pytest.mark.parametrize(
    ("result", "items", "is_list", "place"),
    [
        (lambda part, hidden, **_: hidden * 2, None, False, 0),
        (lambda part, hidden, **_: (hidden * 2, None), 2, False, 0),
        (lambda part, hidden, **_: [hidden * 2, part, None], 3, True, 0),
        (lambda part, hidden, **_: (None, hidden * 2), 2, False, 1),
    ],
)
def test_what_a_module_returns_is_seen(result: Any, items: int | None, is_list: bool, place: int) -> None:
    seen = returned(result)
    assert seen == Returned(items, is_list, place, ("hidden", "residual"), first_alike=False)
    for nothing in candidates([seen]):
        stub = NoAttention(Calls(result), seen, nothing)
        given = stub(X[..., :1], hidden=X, mask=None, residual=X + 1)
        values = [given] if items is None else list(given)
        assert type(given) is type(result(X[..., :1], X)) or nothing.kind == "number"
        assert len(values) == (items or 1)
        assert all(value is None for index, value in enumerate(values) if index != place)
        value = values[place]
        if nothing.kind == "number":
            assert type(value) is int and value == 0
        elif nothing.kind == "zeros":
            assert torch.equal(value, torch.zeros_like(X))
        else:
            assert value is X if nothing.which == 0 else torch.equal(value, X + 1)


def test_the_cheapest_is_tried_first() -> None:
    both, one, none = (Returned(None, False, 0, alike, False) for alike in (("a", "b"), (0,), ()))
    kinds = [("number", 0), ("zeros", 0), ("argument", 0), ("argument", 1)]
    assert [(found.kind, found.which) for found in candidates([both, both])] == kinds
    assert candidates([both, one]) == [Nothing("number"), Nothing("zeros"), Nothing("argument", 0)]
    assert candidates([both, none]) == [Nothing("number")]


def test_plain_attributes_stay_and_nothing_else() -> None:
    dropped = Calls(lambda *_, **__: X).train(False)
    stub = NoAttention(dropped, returned(lambda part, hidden, **_: (hidden, None)), Nothing("number"))
    assert (stub.window, stub.kind, stub.is_causal, stub.scale, stub.training) == (4, "full", True, None, False)
    assert not hasattr(stub, "sizes") and not hasattr(stub, "_hidden")
    assert not list(stub.parameters()) and not list(stub.buffers()) and not list(stub.children())
    assert copy.deepcopy(stub)(hidden=X) == (0, None)


@pytest.mark.parametrize(
    ("nothing", "text"),
    [
        (Nothing("number"), "NoAttention(returns=(0, None))"),
        (Nothing("zeros"), "NoAttention(returns=(zeros, None))"),
        (Nothing("argument", 1), "NoAttention(returns=(argument residual, None))"),
    ],
)
def test_it_says_what_it_returns(nothing: Nothing, text: str) -> None:
    assert repr(NoAttention(Calls(None), returned(lambda part, hidden, **_: (hidden, None)), nothing)) == text


def test_a_bare_stub_says_so() -> None:
    seen = returned(lambda part, hidden, **_: hidden)
    assert repr(NoAttention(Calls(None), seen, Nothing("number"))) == "NoAttention(returns=0)"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda *_, **__: {"hidden": X}, "inner returns a dict"),
        (lambda *_, **__: (None, 3), "inner returns no tensor"),
    ],
)
def test_what_no_stub_can_return_is_refused(result: Any, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        returned(result)


def test_a_module_that_is_not_called_is_refused_and_no_hook_stays() -> None:
    model = Caller(lambda part, hidden, **_: hidden)
    with pytest.raises(SurgeryError, match="unused is not called as a module"):
        watch(model, ["inner", "unused"], lambda: model(X))
    assert not model.inner._forward_hooks and not model.unused._forward_hooks


def test_norms_are_told_from_other_modules() -> None:
    assert Returned(None, False, 0, (0,), first_alike=True).is_norm_like
    assert not Returned(None, False, 0, (1,), first_alike=False).is_norm_like
    assert not Returned(2, False, 0, (0,), first_alike=True).is_norm_like


def test_a_norms_stand_in_passes_anything_on_and_knows_its_dtype() -> None:
    stand_in = NoNorm(nn.LayerNorm(4, dtype=torch.bfloat16).eval())
    assert stand_in(0) == 0 and stand_in(X) is X and not stand_in.training
    assert not list(stand_in.parameters()) and not stand_in.state_dict()
    assert stand_in.weight.dtype == torch.bfloat16 and stand_in.weight.numel() == 0
    assert stand_in.to(torch.float64).bias.dtype == torch.float64
