"""Hypothesis strategies for random stacks.

@given(stacks())
def test_mine(spec):
    model = Stack(spec)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from hypothesis import strategies as st

from fxfusion.testing import spec
from fxfusion.testing.effects import BESIDE


def ffns() -> st.SearchStrategy[spec.Ffn]:
    """Feed-forward blocks of every kind. Widths differ, and one of them equals the hidden size."""
    return st.builds(
        spec.Ffn,
        layout=st.sampled_from(get_args(spec.Layout)),
        norm=st.sampled_from(get_args(spec.NormKind)),
        activation=st.sampled_from(get_args(spec.Activation)),
        scale=st.sampled_from(get_args(spec.Scale)),
        bias=st.booleans(),
        flat=st.booleans(),
        width=st.sampled_from((8, 4, 6, 10)),
        inner=st.sampled_from(("none",) * 6 + get_args(spec.Inner)),
        output=st.sampled_from(("none",) * 10 + get_args(spec.NormKind)),
    )


@st.composite
def runs(draw: Any) -> list[spec.Ffn]:
    """One to four FFNs in a row that mostly fit each other: the same kind, other widths, scales, biases."""
    model: spec.Ffn = draw(ffns())
    found = []
    for _ in range(draw(st.integers(1, 4))):
        other: spec.Ffn = draw(ffns())
        kept = draw(st.integers(0, 7))
        layout = model.layout
        if model.layout in spec.PACKED and other.layout in spec.PACKED:
            layout = other.layout
        found.append(
            spec.Ffn(
                layout=other.layout if kept == 7 else layout,
                norm=other.norm if kept == 6 else model.norm,
                activation=other.activation if kept == 5 else model.activation,
                scale=other.scale if model.output == "none" or kept == 2 else model.scale,
                bias=other.bias,
                flat=model.flat,
                width=other.width,
                inner=other.inner if kept == 4 else model.inner,
                output=other.output if kept == 3 else model.output,
            )
        )
    return found


def others() -> st.SearchStrategy[spec.Block]:
    """Blocks that end a chain."""
    return st.one_of(
        st.builds(spec.Tap, back=st.integers(0, 2)),
        st.builds(spec.Mixer, kind=st.sampled_from(get_args(spec.MixerKind))),
        st.builds(spec.NotFfn, kind=st.sampled_from(get_args(spec.LookAlike))),
        st.just(spec.StreamNorm()),
    )


@st.composite
def effect_stacks(draw: Any) -> spec.StackSpec:
    """Short stacks with effects between the blocks and inside the FFNs."""
    given: spec.StackSpec = draw(st.one_of(_alike(), _alike(), stacks(max_runs=1)))
    blocks: list[spec.Block] = []
    places: list[int] = []  # where each block went: a repeated module is named by its block's number
    for block in given.blocks:
        if draw(st.integers(0, 3)) == 3:
            blocks.append(draw(_effects()))
        if isinstance(block, spec.Again):
            block = spec.Again(block=places[block.block])
        places.append(len(blocks))
        blocks.append(draw(_with_effect(block)))
    done = replace(given, blocks=tuple(blocks))
    if not done.has_effects or draw(st.booleans()):
        blocks.append(draw(_effects()))
    return replace(given, blocks=tuple(blocks))


@st.composite
def _alike(draw: Any) -> spec.StackSpec:
    """Two to four FFNs that fit each other, and at most one block of another kind behind them."""
    model: spec.Ffn = draw(ffns())
    members = st.builds(
        lambda width, bias: replace(model, width=width, bias=bias), st.sampled_from((8, 4, 6)), st.booleans()
    )
    run = draw(st.lists(members, min_size=2, max_size=4))
    after = draw(st.lists(others(), max_size=1))
    tokens = draw(st.sampled_from(((2, 3), (1, 8))))
    return spec.StackSpec(blocks=(*run, *after), seed=draw(st.integers(0, 2**16)), tokens=tokens)


def _effects() -> st.SearchStrategy[spec.Effect]:
    """Every kind; those that leave the stream alone, and so the groups around them whole, more often."""
    kinds = (*sorted(BESIDE), *get_args(spec.EffectKind))
    return st.builds(spec.Effect, kind=st.sampled_from(kinds))


def _with_effect(block: spec.Block) -> st.SearchStrategy[spec.Block]:
    """The block itself as a rule; an FFN sometimes with an effect inside or another kind of addition."""
    if not isinstance(block, spec.Ffn):
        return st.just(block)
    acting = st.builds(
        lambda within, total: replace(block, within=within, sum=total),
        st.sampled_from(get_args(spec.Within)),
        st.sampled_from(get_args(spec.Sum)),
    )
    return st.one_of(*[st.just(block)] * 5, acting)


@st.composite
def stacks(draw: Any, max_runs: int = 3) -> spec.StackSpec:
    """Stacks of runs of FFNs with other blocks and repeated modules between them."""
    blocks: list[spec.Block] = []
    for _ in range(draw(st.integers(1, max_runs))):
        blocks += draw(runs())
        earlier = [index for index, block in enumerate(blocks) if isinstance(block, spec.Ffn)]
        if draw(st.integers(0, 4)) == 4:
            blocks.append(spec.Again(block=draw(st.sampled_from(earlier))))
        blocks += draw(st.lists(others(), max_size=2))
    return spec.StackSpec(
        blocks=tuple(blocks),
        seed=draw(st.integers(0, 2**16)),
        tokens=draw(st.sampled_from(((2, 3), (1, 8), (8, 8)))),
    )
