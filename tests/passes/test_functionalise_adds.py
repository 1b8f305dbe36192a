"""In-place residual additions: harmless ones become sums, the others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfusion.capture import captured_from_graph
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.passes.functionalise_adds import FunctionaliseAdds
from tests.helpers import apply, capture, graph_text, run_graph, tokens
from tests.passes.test_drop_no_ops import Of


def iadd(b: Tensor, x: Tensor) -> Tensor:
    b += x
    return b


def read_twice(x: Tensor) -> Tensor:
    b = x * 2
    c = b * 3
    b.add_(x)
    return b + c


def through_a_view(x: Tensor) -> Tensor:
    b = x * 2
    b.view(-1, 8).add_(1)
    return b * 3


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: (x * 2).add_(x) * 3,
    "number": lambda x: (x * 2).add_(1.5) * 3,
    "broadcast": lambda x: (x * 2).add_(torch.ones(8, dtype=torch.float64)) * 3,
    "a view that only it reads": lambda x: (x * 2).view(-1, 8).add_(1) * 3,
    "two in a row": lambda x: (x * 2).add_(x).add_(x) * 3,
    "a value read before and behind": read_twice,
    "a view made behind": lambda x: ((b := x * 2).add_(x), b.view(-1, 8) * 3)[1],
}
HARMFUL: dict[str, Callable[[Tensor], Tensor]] = {
    "the input": lambda x: x.add_(1) * 3,
    "a view of the input": lambda x: x.view(-1, 8).add_(1) * 3,
    "a view of a value that is read": through_a_view,
    "a view that is read behind": lambda x: ((v := (b := x * 2).view(-1, 8)), b.add_(x), v * 3)[2],
    "a view that is returned": lambda x: ((b := x * 2).view(-1, 8), b.add_(x))[0],
    "a sum that would be wider": lambda x: x.float().mul(2).add_(x) * 3,
    "a scaled sum": lambda x: (x * 2).add_(x, alpha=2) * 3,
    "not an addition": lambda x: (x * 2).mul_(x) * 3,
    "an attribute of the input": lambda x: x.mT.add_(1) * 3,
}


@pytest.mark.parametrize("function", HARMLESS.values(), ids=HARMLESS)
def test_private_sums_become_functional(function: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Of(function), tokens(), how="symbolic")
    work, records = apply(captured, FunctionaliseAdds())
    assert records[0].changed >= 1
    assert "add_" not in graph_text(work)
    assert torch.equal(run_graph(work), function(tokens()))
    assert apply(work, FunctionaliseAdds())[1][0].changed == 0


@pytest.mark.parametrize("function", HARMFUL.values(), ids=HARMFUL)
def test_writes_that_somebody_sees_stay(function: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Of(function), tokens(), how="symbolic")
    work, records = apply(captured, FunctionaliseAdds())
    assert records[0].changed == 0
    assert graph_text(work) == graph_text(captured)


@pytest.mark.parametrize("known", [True, False])
def test_a_sum_whose_dtype_nothing_tells_stays(known: bool) -> None:
    """Written in place it is float32; a sum of its own would be float64."""
    gm = fx.symbolic_trace(Of(lambda x: x.float().add(1).add_(x) * 3))
    x = tokens()
    if known:
        gm = captured_from_graph(gm, (x,)).module
    history = History()
    run_passes(gm, [FunctionaliseAdds()], history)
    assert history.records[-1].changed == 0
    assert gm(x).dtype == torch.float32


def test_the_operator_as_dynamo_records_it() -> None:
    captured = capture(Of(lambda x: iadd(x * 2, x) * 3), tokens())
    work, records = apply(captured, FunctionaliseAdds())
    assert records[0].changed == 1 and "add_" not in graph_text(work)
    assert torch.equal(run_graph(work)[0], (tokens() * 2 + tokens()) * 3)


def test_golden(golden: Callable[[str, str], None]) -> None:
    captured = capture(Of(lambda x: F.silu(x * 2).add_(x)), tokens(), how="symbolic")
    golden("functionalise_adds.before", graph_text(captured))
    golden("functionalise_adds.after", graph_text(apply(captured, FunctionaliseAdds())[0]))
