"""hoist_mixers: the mixers of a window go before its FFNs; approximate, and marked so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion.passes.hoist_mixers import HoistMixers
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.match_window import WindowMatcher
from fxfusion.plan.groups import PlannedGroup
from tests.helpers import (
    CapturedGraph,
    History,
    How,
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
from tests.passes.test_find_chains import Layer


def decoder(count: int = 3, seed: int = 0) -> Stack:
    return randomise(Stack([Layer(True) for _ in range(count)]), seed)


def hoisted(model: nn.Module, windows: Sequence[Sequence[int]], x: Tensor, how: How = "dynamo") -> CapturedGraph:
    work = normalise(capture(model, x, how=how))
    facts = facts_of(work)
    wanted = [PlannedGroup(window, "hoist") for window in windows]
    matched = WindowMatcher(match_residual(facts, {}), facts, "fold").match(wanted)
    found = matched.windows
    assert not matched.refusals
    history = History()
    run_passes(work.module, [HoistMixers(found)], history)
    assert history.records[-1].changed == sum(len(window) - 1 for window in windows)
    return work


def by_hand(model: Any, windows: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """Attentions of a window, then its FFNs, one after another."""
    window_of = {window[0]: window for window in windows}
    number = 0
    while number < len(model.layers):
        window = [model.layers[member] for member in window_of.get(number, [number])]
        for layer in window:
            x = layer.attention(x)
        for layer in window:
            x = layer.mlp(x)
        number += len(window)
    return x


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic"])
@pytest.mark.parametrize("windows", [[[0, 1]], [[1, 2]], [[0, 1, 2]], [[0, 1], [2, 3]]])
def test_equals_the_hoisted_form(windows: list[list[int]], how: How) -> None:
    model, x = decoder(4), tokens()
    result = run_graph(hoisted(model, windows, x, how))
    found = result[0] if isinstance(result, tuple) else result
    assert_exact(found, by_hand(model, windows, x), torch.float64)
    assert error_of(found, model(x)) > 1e-2, "an approximation, not the model itself"
    assert error_of(found, by_hand(decoder(4, seed=1), windows, x)) > 1e-2, "the comparison can fail"


class Flat(nn.Module):
    """A layer whose FFN sees the stream as `[tokens, hidden]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner.attention(x)
        return self.inner.mlp(y.reshape(-1, y.shape[-1])).view(x.shape)


def test_a_stream_that_is_regrouped_for_the_ffns() -> None:
    model, x = randomise(Stack([Flat() for _ in range(3)])), tokens()
    (found,) = run_graph(hoisted(model, [[0, 1, 2]], x))
    assert_exact(found, by_hand(Stack([layer.inner for layer in model.layers]), [[0, 1, 2]], x), torch.float64)


def test_the_mixers_keep_their_order() -> None:
    model, x = decoder(4), tokens()
    before = normalise(capture(model, x))
    after = hoisted(model, [[0, 1, 2, 3]], x)
    attentions = [[node.name for node in nodes_named(work, "scaled_dot_product_attention")] for work in (before, after)]
    assert len(attentions[0]) == 4 and attentions[0] == attentions[1]


def test_without_windows_nothing_changes() -> None:
    model, x = decoder(), tokens()
    work = normalise(capture(model, x, how="symbolic"))
    text = graph_text(work)
    history = History()
    run_passes(work.module, [HoistMixers(())], history)
    assert history.records[-1].changed == 0 and not HoistMixers.exact
    assert graph_text(work) == text and torch.equal(run_graph(work), model(x))


def test_twice_is_once() -> None:
    model, x = decoder(), tokens()
    work = hoisted(model, [[0, 1, 2]], x, "symbolic")
    text, facts = graph_text(work), facts_of(work)
    names = PlannedGroup((0, 1, 2), "hoist")
    windows = WindowMatcher(match_residual(facts, {}), facts, "fold").match([names]).windows
    assert not windows[0].mixers
    run_passes(work.module, [HoistMixers(windows)], History())
    assert graph_text(work) == text


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    model, x = decoder(2), tokens()
    golden("hoist_mixers.before", graph_text(normalise(capture(model, x, how="symbolic"))))
    golden("hoist_mixers.after", graph_text(hoisted(model, [[0, 1]], x, "symbolic")))
