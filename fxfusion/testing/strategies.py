"""Hypothesis strategies for random stacks.

@given(stacks())
def test_mine(spec):
    model = Stack(spec)
"""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from fxfusion.testing import spec


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
