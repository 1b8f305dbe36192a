"""Which channels of a projection the middle reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.passes.match_linear import match_linear
from fxfusion.passes.match_pieces import Cuts, keeps_channels, match_pieces
from tests.helpers import capture, customs, facts_of, nodes_named, tokens

Cut = Callable[[Tensor], Any]


def two(parts: Any) -> tuple[Tensor, ...]:
    return parts[0], parts[1]


def three(parts: Any) -> tuple[Tensor, ...]:
    return parts[0], parts[1], parts[2]


def cuts_of(cut: Cut) -> Cuts:
    """The pieces of one projection `[2, 5, 24]` that `cut` reads; what it returns is summed up."""

    def branch(m: Any, x: Tensor) -> Tensor:
        found = cut(F.linear(x, m.wide))
        parts = list(found) if isinstance(found, (tuple, list)) else [found]
        return sum((part * 1).sum() for part in parts) * x

    captured = capture(customs(branch, count=1), tokens(), how="symbolic")
    facts = facts_of(captured)
    linear = match_linear(nodes_named(captured, "linear")[0], facts)
    assert linear is not None
    after = [node for node in captured.module.graph.nodes if facts.order[node] > facts.order[linear.node]]
    return match_pieces([linear], after)


def ranges(cuts: Cuts) -> list[tuple[int, int, int]]:
    return [(piece.start, piece.stop, piece.step) for piece in cuts.pieces.values()][1:]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (lambda h: two(h.chunk(2, -1)), [(0, 12, 1), (12, 24, 1)]),
        (lambda h: three(h.chunk(3, dim=2)), [(0, 8, 1), (8, 16, 1), (16, 24, 1)]),
        (lambda h: two(h.split([10, 14], -1)), [(0, 10, 1), (10, 24, 1)]),
        (lambda h: three(h.split(9, -1)), [(0, 9, 1), (9, 18, 1), (18, 24, 1)]),
        (lambda h: three(h.tensor_split(5, -1)), [(0, 5, 1), (5, 10, 1), (10, 15, 1)]),
        (lambda h: (h[..., :7], h[..., 7:]), [(0, 7, 1), (7, 24, 1)]),
        (lambda h: (h[..., ::2], h[..., 1::2]), [(0, 24, 2), (1, 24, 2)]),
        (lambda h: h.chunk(2, -1)[1][..., ::3], [(12, 24, 1), (12, 24, 3)]),
        (lambda h: h.narrow(2, 4, 6), [(4, 10, 1)]),
        (lambda h: h.view(10, 24)[:, 3:9], [(3, 9, 1)]),
    ],
    ids=[
        "chunk",
        "three",
        "sizes",
        "uneven split",
        "tensor_split",
        "slices",
        "every other",
        "of a piece",
        "narrow",
        "2-D",
    ],
)
def test_pieces(cut: Cut, expected: list[tuple[int, int, int]]) -> None:
    cuts = cuts_of(cut)
    assert ranges(cuts) == expected
    assert all(piece.width == piece.node.meta["example_value"].shape[-1] for piece in cuts.pieces.values())


@pytest.mark.parametrize(
    "cut",
    [
        lambda h: two(h.chunk(2, 1)),
        lambda h: two(h.split(1)),
        lambda h: h[:, 1:],
        lambda h: h.view(1, 2, 5, 24)[:, :, 1:],
        lambda h: h[0],
        lambda h: h[:, :, 3],
        lambda h: h[..., [0, 1, 2]],
        lambda h: h[..., None],
        lambda h: two(h.tensor_split([3, 9], -1)),
        lambda h: h.narrow(0, 0, 1),
        lambda h: h.unflatten(-1, (2, 12)),
        lambda h: h.transpose(1, 2),
    ],
    ids="tokens batch slice viewed first channel gather axis indices narrow unflatten transpose".split(),
)
def test_cuts_of_other_axes_and_kinds_are_no_pieces(cut: Cut) -> None:
    assert ranges(cuts_of(cut)) == []


def test_views_that_keep_the_channels_are_looked_through() -> None:
    cuts = cuts_of(lambda h: h.view(10, 24).unsqueeze(0).clone())
    assert len(cuts.aliases) == 3
    assert {cuts.resolve(view) for view in cuts.aliases} == {next(iter(cuts.pieces))}


def test_reading_the_same_bits_as_another_type_is_no_plain_view() -> None:
    captured = capture(customs(lambda m, x: x.view(torch.int64) * x, count=1), tokens(), how="symbolic")
    view = nodes_named(captured, "view")[0]
    assert not keeps_channels(view, view.all_input_nodes[0])
