"""concat_parallel_mixers: projections of mixers that read one stream become one GEMM in and one out; exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion import fuse_graph
from fxfusion.passes.concat_parallel_mixers import ConcatParallelMixers
from fxfusion.passes.hoist_mixers import HoistMixers
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.match_window import WindowMatcher
from fxfusion.passes.parallelise_mixers import ParalleliseMixers
from fxfusion.plan.groups import PlannedGroup
from tests.helpers import (
    Block,
    CapturedGraph,
    Gated,
    History,
    How,
    Rms,
    Stack,
    assert_exact,
    capture,
    error_of,
    facts_of,
    graph_text,
    nodes_named,
    normalise,
    randomise,
    run_graph,
    run_passes,
    tokens,
)


class Heads(nn.Module):
    """x + attention(norm(x)): grouped-query, biases, a norm on queries and keys."""

    def __init__(self, heads: int = 2, norm: Callable[[int], nn.Module] = Rms, out: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.heads = norm(8), heads
        self.q, self.k, self.v = nn.Linear(8, 4 * heads), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.q_norm, self.k_norm = Rms(4), Rms(4)
        self.o = out or nn.Linear(4 * heads, 8)

    def attention(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (part(n).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (part.expand(-1, self.heads, -1, -1) for part in (self.k_norm(k), v))
        mixed = F.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True)
        found: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Layer(nn.Module):
    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads, self.mlp = heads, Block(Rms(8), Gated())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.heads(x))


def decoder(*heads: Heads, seed: int = 0) -> Stack:
    return randomise(Stack([Layer(one) for one in heads or (Heads(), Heads(4), Heads())]), seed)


def widened(model: nn.Module, x: Tensor, how: How = "dynamo") -> tuple[CapturedGraph, ConcatParallelMixers]:
    """Every layer in one wide window; the graph before the pass, and the pass."""
    work = normalise(capture(model, x, how=how))
    facts = facts_of(work)
    matches = match_residual(facts, {})
    names = PlannedGroup(range(len(model.layers)), "wide")
    windows = WindowMatcher(matches, facts, "fold").match([names]).windows
    beside = ParalleliseMixers(windows, matches)
    run_passes(work.module, [HoistMixers(windows), beside], History())
    return work, ConcatParallelMixers(beside.blocks, work.weights, {}, 0)


def joined(model: nn.Module, x: Tensor, how: How = "dynamo") -> CapturedGraph:
    work, step = widened(model, x, how)
    history = History()
    run_passes(work.module, [step], history)
    assert history.records[-1].changed == 1 and history.records[-1].exact, history.refusals
    return work


def by_hand(model: Any, x: Tensor) -> Tensor:
    x = x + sum(layer.heads.attention(x) for layer in model.layers)
    for layer in model.layers:
        x = layer.mlp(x)
    return x


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic"])
def test_equals_the_parallel_form(how: How) -> None:
    model, x = decoder(), tokens()
    work = joined(model, x, how)
    result = run_graph(work)
    found = result[0] if isinstance(result, tuple) else result
    assert_exact(found, by_hand(model, x), torch.float64)
    assert error_of(found, model(x)) > 1e-2 and error_of(found, by_hand(decoder(seed=1), x)) > 1e-2
    # 1 in, 1 out, and 3 of each FFN; the attentions stay one operation a layer
    assert len(nodes_named(work, "linear")) == 2 + 3 * 3
    assert len(nodes_named(work, "scaled_dot_product_attention")) == 3


@pytest.mark.parametrize(
    "norm",
    [lambda hidden: nn.Identity(), Rms, lambda hidden: Rms(hidden, offset=1.0)],
    ids=["none", "gain", "1 + gain"],
)
def test_norms(norm: Callable[[int], nn.Module]) -> None:
    model, x = decoder(Heads(norm=norm), Heads(norm=norm)), tokens()
    assert_exact(run_graph(joined(model, x))[0], by_hand(model, x), torch.float64)


def test_packed_weights_follow_the_model() -> None:
    """Through the whole pipeline: weights are packed once, as parameters of the new graph."""
    model, x = decoder(), tokens()
    captured = capture(model, x, how="symbolic")
    window = {"members": [0, 1, 2], "mixers": "wide"}
    fused, report = fuse_graph(captured.module, captured.inputs, policy={"windows": [window]}, verify="numeric")
    y = x + sum(layer.heads.attention(x) for layer in model.layers)
    assert_exact(fused(x), y + sum(layer.mlp.ffn(layer.mlp.norm(y)) for layer in model.layers), torch.float64)
    assert [group.mixers for group in report.groups] == ["wide"]
    assert len([node for node in fused.graph.nodes if node.op == "call_function" and node.target is torch.cat]) == 1


class Scaled(Heads):
    def attention(self, x: Tensor) -> Tensor:
        return 0.5 * super().attention(x)


class Halved(Heads):
    """Its addition scales what it adds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.attention(x), alpha=0.5)


def test_an_addition_that_scales_its_branch_stays_apart() -> None:
    work, step = widened(decoder(Halved(), Halved()), tokens())
    before, history = run_graph(work)[0], History()
    run_passes(work.module, [step], history)
    assert "the addition of layers.0 scales its branch" in history.refusals[-1].message
    assert torch.equal(run_graph(work)[0], before)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (lambda: Heads(norm=nn.LayerNorm), "the norm of layers.0 has a shift"),
        (Scaled, "layers.0 does not end with a linear layer"),
    ],
)
def test_what_does_not_fit_stays_apart(heads: Callable[[], Heads], words: str) -> None:
    model, x = decoder(heads(), heads()), tokens()
    work, step = widened(model, x)
    text, history = graph_text(work), History()
    run_passes(work.module, [step], history)
    assert history.records[-1].changed == 0 and words in history.refusals[-1].message
    assert graph_text(work) == text
    assert_exact(run_graph(work)[0], by_hand(model, x), torch.float64)


def test_other_norms_stay_apart() -> None:
    model, x = decoder(Heads(), Heads(norm=lambda hidden: Rms(hidden, eps=1e-3))), tokens()
    work, step = widened(model, x)
    history = History()
    run_passes(work.module, [step], history)
    assert "the norm of layers.1 differs from that of layers.0" in history.refusals[-1].message


def test_without_blocks_nothing_changes() -> None:
    work = normalise(capture(decoder(), tokens()))
    text, history = graph_text(work), History()
    run_passes(work.module, [ConcatParallelMixers((), work.weights, {}, 0)], history)
    assert history.records[-1].changed == 0 and graph_text(work) == text


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    work, step = widened(decoder(Heads(), Heads()), tokens(), "symbolic")
    golden("concat_parallel_mixers.before", graph_text(work))
    run_passes(work.module, [step], History())
    golden("concat_parallel_mixers.after", graph_text(work))
