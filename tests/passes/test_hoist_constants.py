"""Moving what depends on weights alone to the top, but never past a switch of autocast or grad mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.passes.hoist_constants import HoistConstants
from tests.helpers import CapturedGraph, Of, apply, capture, graph_text, nodes_named, run_graph, tokens


def gains(body: Callable[[Any, Tensor], Tensor]) -> Of:
    one, two = (torch.linspace(low, low + 1, 8, dtype=torch.float64) for low in (0, 1))
    return Of(body, one=nn.Parameter(one), two=nn.Parameter(two))


def late_gain(m: Any, x: Tensor) -> Tensor:
    x = x * (1.0 + m.one)
    return x * (1.0 + m.two).exp()


def gain_without_gradient(m: Any, x: Tensor) -> Tensor:
    x = x * m.one
    with torch.no_grad():
        frozen = m.two * 3.0
    return x * frozen


def written_weight(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    m.two.data.mul_(2)
    return x * (m.two + 1)


def hoist(captured: CapturedGraph) -> tuple[CapturedGraph, int]:
    work, records = apply(captured, HoistConstants(captured.weights))
    return work, records[0].changed


def test_constants_move_to_the_top_and_keep_their_order() -> None:
    captured = capture(gains(late_gain), tokens())
    work, changed = hoist(captured)
    assert changed == 2  # (1 + two) and its exp
    calls = [node for node in work.module.graph.nodes if node.op in ("call_function", "call_method")]
    weights = {node for node in work.module.graph.nodes if node.name in work.weights}
    assert [bool(set(node.all_input_nodes) <= weights) for node in calls[:2]] == [True, True]
    assert torch.equal(run_graph(work)[0], run_graph(captured)[0])
    assert hoist(work)[1] == 0


def test_nothing_to_move_is_no_change() -> None:
    captured = capture(gains(lambda m, x: x * m.one * m.two), tokens())
    work, changed = hoist(captured)
    assert changed == 0 and graph_text(work) == graph_text(captured)


def test_a_constant_does_not_leave_the_region_without_gradients() -> None:
    captured = capture(gains(gain_without_gradient), tokens())
    work, _ = hoist(captured)
    gain = next(node for node in nodes_named(work, "mul") if node.args[1] == 3.0)
    order = list(work.module.graph.nodes)
    switches = nodes_named(work, "_set_grad_enabled")
    assert order.index(switches[0]) < order.index(gain) < order.index(switches[1])
    result = run_graph(work)[0]
    two = next(value for name, value in work.values.items() if "two" in name)
    assert torch.autograd.grad(result.sum(), two, allow_unused=True) == (None,)


def test_a_weight_that_the_graph_writes_is_no_constant() -> None:
    captured = capture(gains(written_weight), tokens(), how="symbolic")
    assert hoist(captured)[1] == 0


def test_golden(golden: Callable[[str, str], None]) -> None:
    captured = capture(gains(late_gain), tokens(), how="symbolic")
    golden("hoist_constants.before", graph_text(captured))
    golden("hoist_constants.after", graph_text(hoist(captured)[0]))
