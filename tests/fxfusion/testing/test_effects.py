"""Effects of random stacks: each does what it says, traced as in eager, and the checks notice what is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, fx

from fxfusion.testing import Again, Block, Effect, Ffn, Stack, StackSpec, Tap, effects
from fxfusion.testing.checks import _traced, check_effects, check_outcome
from fxfusion.testing.spec import EffectKind, Sum, Within

A, B = Ffn(), Ffn(width=4, bias=True)
KINDS = get_args(EffectKind)


def of(*blocks: Block, seed: int = 3) -> StackSpec:
    return StackSpec(blocks=blocks, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_each_effect_is_seen_from_outside(kind: EffectKind) -> None:
    """The stack with the effect leaves something else behind than the stack without it."""
    model, without = Stack(of(A, Effect(kind=kind))), Stack(of(A))
    for number, name in enumerate(("counter", "other", "noise", "cache")):
        value = model.get_buffer(name)
        value.copy_(torch.arange(value.numel(), dtype=value.dtype).view_as(value) + 10 * number + 1)
    with pytest.raises((AssertionError, ValueError)), torch.no_grad():
        check_outcome(model, model.example(), model, without_on_memory_of(model, without))


def without_on_memory_of(model: Stack, without: Stack) -> Callable[[Tensor], tuple[Tensor, ...]]:
    for name in effects.NAMES:
        without.register_buffer(name, getattr(model, name))
    return without


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_effect_does_the_same(kind: EffectKind, seed: int) -> None:
    model = Stack(of(A, Effect(kind="count"), Effect(kind="copy_cache"), Effect(kind=kind), B, seed=seed))
    traced = _traced(model)
    with torch.no_grad():
        check_outcome(model, model.example(), traced, model)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_with_each_effect_are_fused_right(kind: EffectKind) -> None:
    check_effects(of(A, B, Effect(kind=kind), A, B, Effect(kind=kind)))


@pytest.mark.parametrize("within", get_args(Within))
@pytest.mark.parametrize("total", get_args(Sum))
def test_effects_inside_ffns_are_fused_right(within: Within, total: Sum) -> None:
    check_effects(of(A, replace(B, within=within, sum=total), A))
    check_effects(of(replace(A, within=within, sum=total), replace(B, within=within, sum=total), Tap(back=1)))


@pytest.mark.parametrize("kind", sorted(effects.BESIDE.keys() - {"custom_count", "python_count"}))
def test_what_leaves_the_stream_alone_cuts_no_chain(kind: EffectKind) -> None:
    given = of(A, Effect(kind=kind), B)
    assert given.is_certain and Stack(given).groups() == ((0, 2),)
    assert check_effects(given) == 1


@pytest.mark.parametrize("kind", sorted(effects.READING.keys() - {"custom_cache"}))
def test_what_reads_the_stream_cuts_the_chain_there(kind: EffectKind) -> None:
    given = of(A, B, Effect(kind=kind), A, B)
    assert given.is_certain and Stack(given).groups() == ((0, 1), (3, 4))


@pytest.mark.parametrize("kind", sorted(effects.WRITING))
def test_what_writes_the_stream_cuts_the_chain(kind: EffectKind) -> None:
    given = of(A, Effect(kind=kind), B)
    assert not given.is_certain and Stack(given).chains() == ()
    assert check_effects(given) == 0


def test_a_tap_behind_an_addition_in_place_shows_its_result() -> None:
    """Memory that was written since is the stream as it is now, so nothing reads the stream between the two."""
    in_place = replace(B, sum="into_stream")
    assert Stack(of(A, B, Tap(back=1))).chains() == ()
    assert Stack(of(A, in_place, Tap(back=1))).chains() == ((0, 1),)


def test_without_effects_only_computing_remains() -> None:
    given = of(replace(A, within="kept"), Effect(), replace(B, sum="into_stream"), Again(block=2), Effect(kind="add_"))
    assert given.has_effects
    assert given.without_effects() == of(A, B, Again(block=1))
    assert not given.without_effects().has_effects


# --- the checks can fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["count", "noise", "copy_cache", "add_", "custom_count", "python_count"])
def test_a_lost_effect_is_noticed(kind: EffectKind) -> None:
    model = Stack(of(A, Effect(kind=kind), B))
    traced = _traced(model)
    for node in reversed(traced.graph.nodes):
        if not node.users and node.op in ("call_function", "call_method"):
            traced.graph.erase_node(node)
    traced.recompile()
    with pytest.raises(AssertionError, match="off by"), torch.no_grad():
        check_outcome(model, model.example(), traced, model)


def test_effects_in_another_order_are_noticed() -> None:
    model = Stack(of(Effect(kind="count"), A, Effect(kind="view_count")))
    traced = _traced(model)
    count = next(node for node in traced.graph.nodes if node.target == "add_")
    traced.graph.output_node().prepend(count)
    traced.recompile()
    with pytest.raises(AssertionError, match="off by"), torch.no_grad():
        check_outcome(model, model.example(), traced, model)


def test_a_draw_that_nobody_reads_is_noticed() -> None:
    model = Stack(of(A, Effect(kind="count")))

    def draws_one_more(x: Tensor) -> tuple[Tensor, ...]:
        torch.rand(1)
        return model(x)

    with pytest.raises(AssertionError, match="off by"), torch.no_grad():
        check_outcome(model, model.example(), draws_one_more, model)


def test_a_group_over_an_effect_on_the_stream_is_refused_by_the_truth() -> None:
    model = Stack(of(A, Effect(kind="add_"), B))
    with pytest.raises(AssertionError, match="no run of FFNs"):
        model.numbered([["blocks.0", "blocks.2"]])
    assert Stack(of(A, Effect(), B)).numbered([["blocks.0", "blocks.2"]]) == ((0, 2),)


def test_members_that_do_not_fit_are_refused_by_the_truth() -> None:
    model = Stack(of(A, Ffn(layout="plain")))
    with pytest.raises(AssertionError, match="do not fit"):
        model.numbered([["blocks.0", "blocks.1"]])


def test_a_traced_stack_happens_only_when_it_is_called() -> None:
    model = Stack(of(A, Effect(), Effect(kind="copy_cache")))
    graph = _traced(model).graph
    assert not model.get_buffer("counter").any() and not model.get_buffer("cache").any()
    assert isinstance(graph, fx.Graph) and "add_" in {node.target for node in graph.nodes}
