"""When two regions are the same computation, and what the first difference is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfusion.compiler.capture import captured_from_graph
from fxfusion.errors import RefusalCode
from fxfusion.graph.isomorphism import Structure, describe_region, first_difference

Region = Callable[[Tensor, Tensor, Tensor], Any]


class Of(nn.Module):
    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, x: Tensor, c: Tensor, d: Tensor) -> Any:
        return self.region(x, c, d)


def structure(region: Region, width: int = 4) -> Structure:
    example = (torch.rand(2, width), torch.rand(width), torch.rand(width))
    graph = captured_from_graph(fx.symbolic_trace(Of(region)), example).module.graph
    names = {node: node.name for node in graph.nodes if node.op == "placeholder"}
    return describe_region([node for node in graph.nodes if node.op.startswith("call")], names)


def base(x: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return F.gelu(x * c + 0.5, approximate="tanh") * d


def test_equal_regions_of_unequal_widths_are_isomorphic() -> None:
    assert structure(base) == structure(base, width=6)
    assert first_difference(structure(base), structure(base, width=6)) is None


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        return x * factor

    return act


@pytest.mark.parametrize(
    ("other", "code", "words"),
    [
        (lambda x, c, d: F.silu(x * c + 0.5) * d, RefusalCode.DIFFERENT_OPS, "gelu here, silu there"),
        (lambda x, c, d: F.gelu(x * c + 0.25, approximate="tanh") * d, RefusalCode.DIFFERENT_LITERAL, "0.25"),
        (lambda x, c, d: F.gelu(x * c + 0.5, approximate="none") * d, RefusalCode.DIFFERENT_LITERAL, "none"),
        (lambda x, c, d: F.gelu(x * c + 0.5) * d, RefusalCode.DIFFERENT_LITERAL, "gelu"),
        (lambda x, c, d: F.gelu(x * d + 0.5, approximate="tanh") * c, RefusalCode.DIFFERENT_OPS, "different places"),
        (lambda x, c, d: F.gelu(c * x + 0.5, approximate="tanh") * d, RefusalCode.DIFFERENT_OPS, "different places"),
        (lambda x, c, d: base(x, c, d) + 1, RefusalCode.DIFFERENT_OPS, "only one of the two has add"),
        (lambda x, c, d: base(x, c.double(), d), RefusalCode.DIFFERENT_OPS, "double"),
    ],
)
def test_the_first_difference_says_why(other: Region, code: RefusalCode, words: str) -> None:
    found = first_difference(structure(base), structure(other))
    assert found is not None and found[0] is code and words in found[1]


def test_dtypes_differ() -> None:
    one, other = (structure(lambda x, c, d, kind=kind: x.to(kind) * 2) for kind in (torch.float16, torch.bfloat16))
    found = first_difference(one, other)
    assert found is not None and found[0] is RefusalCode.DIFFERENT_DTYPE


def test_literals_are_compared_exactly() -> None:
    one, other = structure(lambda x, c, d: x * 0.1), structure(lambda x, c, d: x * 0.1000000000000001)
    assert first_difference(one, other) is not None


def test_two_functions_of_one_name_are_not_one_operation() -> None:
    graphs = []
    for factor in (1.0, 2.0):
        graph = fx.Graph()
        x = graph.placeholder("x")
        node = graph.call_function(scaled(factor), (x,))
        graphs.append(describe_region([node], {x: "x"}))
    found = first_difference(*graphs)
    assert found is not None and found[0] is RefusalCode.DIFFERENT_OPS


def test_values_without_a_role_must_be_the_very_same() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    one, other = graph.call_function(torch.sin, (a,)), graph.call_function(torch.sin, (b,))
    assert first_difference(describe_region([one], {}), describe_region([other], {})) is not None
    assert describe_region([one], {a: "x"}) == describe_region([other], {b: "x"})
