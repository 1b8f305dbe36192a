"""find_chains: where a run of FFNs begins and ends, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxfusion.errors import Refusal, RefusalCode
from fxfusion.passes.ffn import Chain
from fxfusion.passes.find_chains import find_chains
from fxfusion.passes.match_residual import match_residual
from tests.helpers import (
    Attention,
    Block,
    Gated,
    How,
    Rms,
    Stack,
    capture,
    facts_of,
    normalise,
    randomise,
    refusal_with,
    stack,
    tokens,
)


def chains_of(model: nn.Module, how: How = "dynamo") -> tuple[tuple[Chain, ...], tuple[Refusal, ...]]:
    facts = facts_of(normalise(capture(model, tokens(), how=how)))
    return find_chains(match_residual(facts, {}), facts)


def sizes(chains: tuple[Chain, ...]) -> list[int]:
    return [len(chain.members) for chain in chains]


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic"])
def test_a_run_is_one_chain(how: How) -> None:
    chains, refusals = chains_of(stack(count=4), how)
    assert sizes(chains) == [4] and not refusals
    assert [ffn.layer.rsplit(".", 1)[-1] for ffn in chains[0].members] == ["0", "1", "2", "3"]
    for before, after in zip(chains[0].members, chains[0].members[1:], strict=False):
        assert after.stream is before.add


def test_a_mixer_ends_a_chain_and_the_next_begins_after_it() -> None:
    blocks = stack(count=5).layers
    model = Stack([blocks[0], blocks[1], Attention(), blocks[2], Attention(), blocks[3], blocks[4]])
    randomise(model)
    chains, refusals = chains_of(model)
    assert sizes(chains) == [2, 2] and "follows" in chains[0].ended_by
    alone = refusal_with(refusals, RefusalCode.ALONE, "comes before")
    assert alone.layer.endswith("layers.3.ffn")


class Layer(nn.Module):
    """A decoder layer: an attention that can be dropped, and an FFN."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.attention = Attention() if mixes else nn.Identity()
        self.mlp = Block(Rms(8), Gated())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


def test_the_first_ffn_leads_when_its_own_layer_holds_the_mixer() -> None:
    model = Stack([Layer(True), Layer(False), Layer(False)])
    randomise(model)
    chains, _ = chains_of(model)
    assert sizes(chains) == [3] and chains[0].leading


def test_an_ffn_in_a_layer_of_its_own_never_leads() -> None:
    blocks = stack(count=2).layers
    chains, _ = chains_of(randomise(Stack([Attention(), *blocks])))
    assert sizes(chains) == [2] and not chains[0].leading


class TapBetween(Stack):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second, *rest = self.layers
        middle = second(first(x))
        y = middle
        for layer in rest:
            y = layer(y)
        return y, middle.tanh()


def test_another_reader_of_the_stream_cuts_the_chain() -> None:
    chains, refusals = chains_of(TapBetween(stack(count=5).layers))
    assert sizes(chains) == [2, 3] and "also reads the stream" in chains[0].ended_by
    chains, refusals = chains_of(TapBetween(stack(count=3).layers))
    assert sizes(chains) == [2] and len(refusals) == 1


class NormBetween(Stack):
    def __init__(self) -> None:
        super().__init__(stack(count=2).layers)
        self.norm = Rms(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.norm(self.layers[0](x)))


def test_a_norm_on_the_stream_is_named() -> None:
    chains, refusals = chains_of(randomise(NormBetween()))
    assert not chains
    refusal_with(refusals, RefusalCode.POST_NORM, "the stream after")


class Bounded(Block):
    """No FFN: nothing may stand behind the last linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x)).tanh()


def test_another_sum_between_is_not_taken_for_a_norm() -> None:
    first, last = stack(count=2).layers
    chains, refusals = chains_of(randomise(Stack([first, Bounded(Rms(8), Gated()), last])))
    assert not chains and {refusal.code for refusal in refusals} == {RefusalCode.ALONE, RefusalCode.STREAM_READ}
    refusal_with(refusals, RefusalCode.ALONE, "no other FFN reads the stream after it")


class ModeBetween(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        with torch.no_grad():
            return self.layers[1](x)


def test_a_change_of_grad_mode_cuts_the_chain() -> None:
    chains, refusals = chains_of(ModeBetween(stack(count=2).layers))
    assert not chains
    refusal_with(refusals, RefusalCode.MODE_CHANGE, "changes autocast, grad mode or a level of functorch")


def test_two_independent_towers_are_two_chains() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = stack(count=2), stack(count=3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    chains, _ = chains_of(Towers())
    assert sorted(sizes(chains)) == [2, 3]
