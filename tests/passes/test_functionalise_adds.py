"""In-place residual additions: harmless ones become sums, the others stay."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfusion.compiler.capture import captured_from_graph
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
    "a result of its own": lambda x: torch.add(b := x * 2, x, out=b) * 3,
    "a result into the second": lambda x: torch.add(x, b := x * 2, out=b) * 3,
    "a copy of all": lambda x: (b := x * 2).copy_(b + x) * 3,
    "a copy of all, read by its name": lambda x: ((b := x * 2).copy_(b + x), b * 3)[1],
    "two copies": lambda x: (((b := x * 2).copy_(b + x)), b.copy_(b * 3), b * 1)[2],
    "a copy into new memory": lambda x: torch.empty_like(x).copy_(x + 1) * 3,
    "a view made behind": lambda x: ((b := x * 2).add_(x), b.view(-1, 8) * 3)[1],
    "a sum with what a sum wrote before": lambda x: ((b := x * 2).add_(1), (x * 3).add_(b))[1] * 3,
    "a copy of what a sum wrote before": lambda x: ((b := x * 2).add_(1), (x * 3).copy_(b.tanh()))[1] * 3,
    "a sum with what a copy wrote before": lambda x: ((b := x * 2).copy_(x.tanh()), (x * 3).add_(b))[1] * 3,
}
HARMFUL: dict[str, Callable[[Tensor], Tensor]] = {
    "the input": lambda x: x.add_(1) * 3,
    "a view of the input": lambda x: x.view(-1, 8).add_(1) * 3,
    "a view of a value that is read": through_a_view,
    "a view that is read behind": lambda x: ((v := (b := x * 2).view(-1, 8)), b.add_(x), v * 3)[2],
    "a view that is returned": lambda x: ((b := x * 2).view(-1, 8), b.add_(x))[0],
    "a sum that would be wider": lambda x: x.float().mul(2).add_(x) * 3,
    "a result into a third": lambda x: torch.add(x, x * 2, out=torch.empty_like(x)) * 3,
    "a copy into the input": lambda x: x.copy_(x + 1) * 3,
    "a copy of the input": lambda x: torch.empty_like(x).copy_(x) * 3,
    "a copy of what is read again": lambda x: torch.empty_like(x).copy_(b := x + 1) * 3 + b,
    "a copy into a view that is read": lambda x: ((b := x * 2).view(-1, 8).copy_((x + 1).view(-1, 8)), b * 3)[1],
    "a copy that is written again": lambda x: ((b := x * 2).copy_(x + 1), b.mul_(2), b * 3)[2],
    "a copy of another dtype": lambda x: torch.empty_like(x).copy_(x.float() + 1) * 3,
    "a copy that lies otherwise": lambda x: torch.empty_like(x).copy_((x + 1).mT.tanh().mT) * 3,
    "a scaled sum": lambda x: (x * 2).add_(x, alpha=2) * 3,
    "not an addition": lambda x: (x * 2).mul_(x) * 3,
    "an attribute of the input": lambda x: x.mT.add_(1) * 3,
}


@pytest.mark.parametrize("function", HARMLESS.values(), ids=HARMLESS)
def test_private_sums_become_functional(function: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Of(function), tokens(), how="symbolic")
    work, records = apply(captured, FunctionaliseAdds())
    assert records[0].changed >= 1
    assert not {"add_", "copy_", "out="} & set(re.findall(r"add_|copy_|out=", graph_text(work)))
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


@pytest.mark.parametrize("index", [slice(None), Ellipsis, (Ellipsis, slice(None)), (slice(None),) * 3])
def test_an_assignment_to_all_elements(index: object) -> None:
    def body(x: Tensor) -> Tensor:
        b = x * 2
        b[index] = b + x
        return b * 3

    captured = capture(Of(body), tokens())
    work, records = apply(captured, FunctionaliseAdds())
    assert records[0].changed == 1 and "setitem" not in graph_text(work)
    assert torch.equal(run_graph(work)[0], body(tokens()))


@pytest.mark.parametrize("index", [0, slice(1, None), (slice(None), 0), (Ellipsis, slice(0, 8, 2))])
def test_an_assignment_to_some_elements_stays(index: object) -> None:
    def body(x: Tensor) -> Tensor:
        b = x * 2
        b[index] = (x + 1)[index]
        return b * 3

    captured = capture(Of(body), tokens())
    assert apply(captured, FunctionaliseAdds())[1][0].changed == 0


def test_a_copy_under_another_mode_stays() -> None:
    def body(x: Tensor) -> Tensor:
        b = x * 2
        value = b + x
        with torch.no_grad():
            b.copy_(value)
        return b * 3

    assert apply(capture(Of(body), tokens().requires_grad_()), FunctionaliseAdds())[1][0].changed == 0


def test_golden(golden: Callable[[str, str], None]) -> None:
    captured = capture(Of(lambda x: F.silu(x * 2).add_(x)), tokens(), how="symbolic")
    golden("functionalise_adds.before", graph_text(captured))
    golden("functionalise_adds.after", graph_text(apply(captured, FunctionaliseAdds())[0]))
