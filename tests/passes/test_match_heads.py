"""match_heads: how the projections of a mixer are cut into heads, and which mixers are one with more heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.errors import RefusalCode, Refused
from fxfusion.passes.match_heads import MixerHeads, check_alike, match_heads
from fxfusion.passes.match_mixer import match_mixer
from tests.helpers import facts_of, graph_text, tokens
from tests.passes.test_concat_parallel_mixers import Heads, decoder, widened


def heads(*mixers: nn.Module) -> list[MixerHeads]:
    """Of each mixer of a window; all read one stream by now."""
    work, step = widened(decoder(*mixers), tokens())
    before, facts = graph_text(work), facts_of(work)
    stream = next(node for node in step.blocks[0][0].add.all_input_nodes if node not in step.blocks[0][0].nodes)
    found = [match_heads(match_mixer(mixer, stream, facts, {}, loose=True), facts) for mixer in step.blocks[0]]
    assert graph_text(work) == before
    return found


def channels(found: MixerHeads) -> list[tuple[int, int, int]]:
    return [(piece.projection, piece.start, piece.stop) for piece in found.pieces]


class Packed(Heads):
    """q, k and v in one matrix; `per_head`: of each head behind each other. Scaled after its end."""

    def __init__(self, per_head: bool = False, number: float = 2.0, flat: bool = False) -> None:
        super().__init__()
        self.qkv, self.per_head, self.number, self.flat = nn.Linear(8, 24), per_head, number, flat

    def attention(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        packed = self.qkv(n.reshape(-1, 8)).reshape(*n.shape[:-1], 24) if self.flat else self.qkv(n)
        if self.per_head:
            q, k, v = packed.unflatten(-1, (-1, 12)).chunk(3, -1)
        else:
            q, k, v = (part.unflatten(-1, (-1, 4)) for part in packed.chunk(3, -1))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.o(mixed.transpose(1, 2).flatten(2)) * self.number
        return found


def test_grouped_queries() -> None:
    found, _ = heads(Heads(4), Heads(4))
    assert channels(found) == [(0, 0, 16), (1, 0, 4), (2, 0, 4)] and found.counts == (4, 1, 1)
    assert found.out_count == 4 and len(found.constants) == 2, "norms of queries and keys"


@pytest.mark.parametrize(
    ("mixer", "pieces", "counts"),
    [
        (Packed(), [(0, 0, 8), (0, 8, 16), (0, 16, 24)], (2, 2, 2)),
        (Packed(flat=True), [(0, 0, 8), (0, 8, 16), (0, 16, 24)], (2, 2, 2)),
        (Packed(per_head=True), [(0, 0, 24)], (2,)),
    ],
)
def test_one_matrix_for_all_three(mixer: Packed, pieces: list[tuple[int, int, int]], counts: tuple[int, ...]) -> None:
    found, other = heads(mixer, copy.deepcopy(mixer))
    assert channels(found) == pieces and found.counts == counts
    assert found.ends.end.steps == (("mul", 2.0),)
    check_alike([found, other])


class Scaled(Heads):
    """A number for all channels before they are cut."""

    def attention(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = ((part(n) * 0.5).unflatten(-1, (-1, 4)) for part in (self.q, self.k, self.v))
        k, v = (part.expand(-1, -1, self.heads, -1).transpose(1, 2) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        found: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return found


def test_numbers_before_the_cut() -> None:
    found, _ = heads(Scaled(), Scaled())
    assert found.counts == (2, 1, 1)


class Softened(Heads):
    """Something is computed over the channels of all heads."""

    def attention(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (part(n) for part in (self.q, self.k, self.v))
        q = q.softmax(-1).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (part.unflatten(-1, (-1, 4)).expand(-1, -1, self.heads, -1).transpose(1, 2) for part in (k, v))
        found: Tensor = self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return found


class Half(Packed):
    """Reads only a part of what it projects."""

    def attention(self, x: Tensor) -> Tensor:
        packed = self.qkv(self.norm(x))
        q, k, v = (packed[..., start : start + 4] for start in (0, 8, 16))
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        found: Tensor = self.o(mixed.repeat(1, 1, 2))
        return found


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Softened, "computes softmax of all channels of .*, before they are cut"), (Half, "in whole heads, each once")],
)
def test_what_has_no_heads(kind: Any, words: str) -> None:
    with pytest.raises(Refused, match=words) as found:
        heads(kind(), kind())
    assert found.value.code is RefusalCode.STRUCTURE


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (Heads(2), Heads(4), "have heads of other numbers or sizes"),
        (Packed(), Packed(per_head=True), "have heads of other numbers or sizes"),
        (Heads(2), Scaled(2), "compute differently"),
        (Heads(norm=lambda width: nn.LayerNorm(width, eps=1e-3)), Heads(norm=nn.LayerNorm), "have different norms"),
    ],
)
def test_mixers_that_are_not_alike(one: nn.Module, other: nn.Module, words: str) -> None:
    found = heads(one, other)
    check_alike(found[:1])
    with pytest.raises(Refused, match=words):
        check_alike(found)
