"""match_mixer: the linear layers at both ends of a mixer, and what has none that could be joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor, nn

from fxfusion.errors import RefusalCode, Refused
from fxfusion.passes.ffn import Branch
from fxfusion.passes.match_mixer import match_mixer
from tests.helpers import facts_of, tokens
from tests.passes.test_concat_parallel_mixers import Heads, decoder, widened


def ends(heads: Heads, opaque: Mapping[str, str] | None = None) -> Branch:
    """Of the first mixer of two that read one stream."""
    work, step = widened(decoder(heads, Heads()), tokens())
    mixer = step.blocks[0][0]
    return match_mixer(mixer, mixer.add.all_input_nodes[0], facts_of(work), opaque or {})


def test_projections_norm_and_output() -> None:
    found = ends(Heads(4))
    assert [linear.out_features for linear in found.projections] == [16, 4, 4]
    assert [linear.bias is not None for linear in found.projections] == [True, False, True]
    assert (found.down.in_features, found.hidden, found.name) == (16, 8, "layers.0")
    assert len(found.prologue_constants) == 1 and found.prologue[-1] is found.normed
    assert all(linear.input is found.normed for linear in found.projections)


class Negated(Heads):
    def attention(self, x: Tensor) -> Tensor:
        return super().attention(x).neg()


@pytest.mark.parametrize(("kind", "words"), [(Negated, "layers.0 does not end with a linear layer")])
def test_what_has_no_ends(kind: Any, words: str) -> None:
    with pytest.raises(Refused, match=words) as found:
        ends(kind())
    assert found.value.code is RefusalCode.STRUCTURE


def test_weights_that_cannot_be_packed() -> None:
    work, step = widened(decoder(), tokens())
    facts, mixer = facts_of(work), step.blocks[0][0]
    stream = mixer.add.all_input_nodes[0]
    with pytest.raises(Refused, match="layers.0: quantised") as found:
        match_mixer(mixer, stream, facts, {weight.name: "quantised" for weight in facts.weights})
    assert found.value.code is RefusalCode.TENSOR_SUBCLASS


class Regrouped(Heads):
    def attention(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        flat = n.reshape(-1, 8)
        q, k, v = (part(flat).reshape(2, 5, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        k = k.expand(-1, self.heads, -1, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v.expand(-1, self.heads, -1, -1))
        found: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return found


def test_a_regrouped_stream() -> None:
    with pytest.raises(Refused, match="the projections of layers.0 read a regrouped stream"):
        ends(Regrouped())
