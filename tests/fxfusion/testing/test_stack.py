"""The ground truth of random stacks, on stacks small enough to see the right answer by eye."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fxfusion.testing import Again, Block, Ffn, Mixer, NotFfn, Stack, StackSpec, StreamNorm, Tap
from fxfusion.testing.checks import relative_error

A, WIDER, PLAIN = Ffn(), Ffn(width=4, bias=True, scale="literal"), Ffn(layout="plain")


@pytest.mark.parametrize(
    ("blocks", "groups"),
    [
        ((A,), ()),
        ((A, WIDER), ((0, 1),)),
        ((A, A, A), ((0, 1, 2),)),
        ((A, PLAIN), ()),
        ((A, A, PLAIN, PLAIN), ((0, 1), (2, 3))),
        ((A, Mixer(), A, A), ((2, 3),)),
        ((A, StreamNorm(), A), ()),
        ((A, NotFfn(kind="one_linear"), A), ()),
        ((A, Tap(), A), ()),
        ((A, A, Tap()), ((0, 1),)),
        ((A, A, Tap(back=1)), ()),
        ((A, A, A, Tap(back=1)), ((0, 1),)),
        ((A, Tap(back=2), A), ((0, 2),)),
        ((A, Again(block=0)), ()),
        ((A, A, Again(block=0), A), ((0, 1), (2, 3))),
        ((A, A, NotFfn(kind="reads_earlier")), ()),
        ((Ffn(layout="chunk"), Ffn(layout="slices"), Ffn(layout="interleaved")), ((0, 1),)),
    ],
)
def test_groups(blocks: tuple[Block, ...], groups: tuple[tuple[int, ...], ...]) -> None:
    assert Stack(StackSpec(blocks=blocks)).groups() == groups


def test_a_group_of_one_is_the_block_itself() -> None:
    model = Stack(StackSpec(blocks=(A, Mixer(), WIDER)))
    x = model.example()
    for norm in ("fold", "last"):
        for got, want in zip(model.parallel_forward(x, [(0,), (2,)], norm), model(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_parallel_form_is_the_sum_of_the_branches() -> None:
    model = Stack(StackSpec(blocks=(A, WIDER)))
    x = model.example()
    first, second = model.blocks
    torch.testing.assert_close(model.parallel_forward(x, [(0, 1)])[0], x + first(x) + second(x))
    last = x + first.with_norm(x, second.norm) + second(x)
    torch.testing.assert_close(model.parallel_forward(x, [(0, 1)], "last")[0], last)
    assert relative_error(last, x + first(x) + second(x)) > 1e-3


def test_a_tap_gives_the_stream_of_its_place() -> None:
    model = Stack(StackSpec(blocks=(A, WIDER, Tap(back=1), Tap())))
    x = model.example()
    end, one_back, here = model(x)
    assert torch.equal(end, here)
    assert torch.equal(one_back, x + model.blocks[0](x))


def test_the_seed_fixes_weights_and_input() -> None:
    one, same, other = (Stack(StackSpec(blocks=(A,), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one(one.example())[0], same(same.example())[0])
    assert not torch.equal(one.example(), other.example())


def test_a_look_alike_that_reads_an_earlier_stream_needs_one() -> None:
    model = Stack(StackSpec(blocks=(NotFfn(kind="reads_earlier"),)))
    with pytest.raises(ValueError, match="earlier stream"):
        model(model.example())


def test_nan_counts_as_an_error() -> None:
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(1)) == float("inf")


def test_hypothesis_is_needed_for_the_strategies_only() -> None:
    code = "import sys, fxfusion.testing, fxfusion.testing.checks; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
