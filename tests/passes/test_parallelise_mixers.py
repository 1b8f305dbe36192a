"""parallelise_mixers: the mixers of a wide window read one stream; approximate, and marked so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fxfusion.analysis.planned import PlannedModel
from fxfusion.models.traced import TracedModel
from fxfusion.passes.hoist_mixers import HoistMixers
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.match_window import WindowMatcher
from fxfusion.passes.parallelise_mixers import ParalleliseMixers
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import PlannedGroup
from tests.helpers import (
    Attention,
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
    normalise,
    randomise,
    run_graph,
    run_passes,
    tokens,
)
from tests.passes.test_hoist_mixers import by_hand as hoisted_by_hand
from tests.passes.test_hoist_mixers import decoder
from tests.tiny_lm import TinyLm, ids

Mode = Literal["hoist", "wide"]


def widened(
    model: nn.Module, windows: Sequence[Sequence[int]], x: Tensor, how: How = "dynamo", mode: Mode = "wide"
) -> CapturedGraph:
    work = normalise(capture(model, x, how=how))
    facts = facts_of(work)
    matches = match_residual(facts, {})
    matched = WindowMatcher(matches, facts, "fold").match([PlannedGroup(window, mode) for window in windows])
    found = matched.windows
    assert not matched.refusals
    history = History()
    run_passes(work.module, [HoistMixers(found), ParalleliseMixers(found, matches)], history)
    assert not history.records[-1].exact
    assert history.records[-1].changed == (sum(len(window) - 1 for window in windows) if mode == "wide" else 0)
    return work


def by_hand(model: Any, windows: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """Attentions of a window all on its input, then its FFNs, one after another."""
    window_of = {window[0]: window for window in windows}
    number = 0
    while number < len(model.layers):
        window = [model.layers[member] for member in window_of.get(number, [number])]
        x = x + sum(layer.attention(x) - x for layer in window)
        for layer in window:
            x = layer.mlp(x)
        number += len(window)
    return x


class Nested(nn.Module):
    """A layer as two numbered parts: `layers.0.parts.0` is its attention, `layers.0.parts.1` its FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Attention(), Block(Rms(8), Gated())])

    def forward(self, x: Tensor) -> Tensor:
        attention, ffn = self.parts
        found: Tensor = ffn(attention(x))
        return found


def test_the_leading_mixer_belongs_to_the_window_whatever_paths_are_called() -> None:
    model, x = randomise(Stack([Nested() for _ in range(3)])), tokens()
    found = run_graph(widened(model, [[0, 1, 2]], x))[0]
    wanted = x + sum(layer.parts[0](x) - x for layer in model.layers)
    for layer in model.layers:
        wanted = layer.parts[1](wanted)
    assert_exact(found, wanted, torch.float64)


@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic"])
@pytest.mark.parametrize("windows", [[[0, 1]], [[1, 2]], [[0, 1, 2]], [[0, 1], [2, 3]]])
def test_equals_the_wide_form(windows: list[list[int]], how: How) -> None:
    model, x = decoder(4), tokens()
    result = run_graph(widened(model, windows, x, how))
    found = result[0] if isinstance(result, tuple) else result
    assert_exact(found, by_hand(model, windows, x), torch.float64)
    assert error_of(found, hoisted_by_hand(model, windows, x)) > 1e-2, "it is not the hoisted form"
    assert error_of(found, by_hand(decoder(4, seed=1), windows, x)) > 1e-2, "the comparison can fail"


def test_hoisted_windows_stay_as_they_are() -> None:
    model, x = decoder(3), tokens()
    before = graph_text(widened(model, [[0, 1]], x, mode="hoist"))
    assert before != graph_text(widened(model, [[0, 1]], x))
    result = run_graph(widened(model, [[0, 1]], x, mode="hoist"))
    assert_exact(result[0] if isinstance(result, tuple) else result, hoisted_by_hand(model, [[0, 1]], x), torch.float64)


def test_what_still_reads_the_stream_before_it_is_noticed() -> None:
    model, x = decoder(3), tokens()
    work = normalise(capture(model, x))
    facts = facts_of(work)
    matches = match_residual(facts, {})
    found = WindowMatcher(matches, facts, "fold").match([PlannedGroup([0, 1], "wide")]).windows
    run_passes(work.module, [HoistMixers(found)], History())
    assert "still reads" in ParalleliseMixers(found, matches).ensures(work.module.graph)[0]


@pytest.mark.parametrize("dropped", [(), (2,), (1,), (3,)])
def test_a_plan_with_dropped_attention_and_a_wide_window(dropped: tuple[int, ...]) -> None:
    model, tokens_ = TinyLm(5), ids()
    plan = FusionPlan(groups=[{"members": [1, 2, 3], "mixers": "wide"}], dropped_attention=dropped)
    found = PlannedModel(TracedModel(model), plan)(tokens_)
    x = model.layers[0](model.embedding(tokens_))
    y = x + sum(model.layers[i].attention(x) - x for i in (1, 2, 3) if i not in dropped)
    y = y + sum(model.layers[i].mlp(y) - y for i in (1, 2, 3))
    expected = model.head(model.layers[4](y))
    assert_exact(found, expected, torch.float64)
    assert error_of(found, model(tokens_)) > 1e-3
