"""The pass manager: dead code, checks, records, and errors that name the pass and those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxfusion.errors import PassError
from fxfusion.graph.pass_base import History, Pass, PassResult
from fxfusion.graph.pass_manager import run_passes
from tests.helpers import CapturedGraph, capture, tokens


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).sin() + 1


class Step(Pass):
    """A pass from a function."""

    name: ClassVar[str] = "step"
    exact: ClassVar[bool] = True

    def __init__(self, edit: Callable[[fx.Graph], int], wrong: Sequence[str] = ()) -> None:
        self.edit, self.wrong = edit, wrong

    def run(self, graph: fx.Graph) -> PassResult:
        return PassResult(self.edit(graph), notes=("noted",))

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        return self.wrong


class Quiet(Step):
    name: ClassVar[str] = "quiet"


def net() -> CapturedGraph:
    return capture(Net(), tokens(), how="symbolic")


def by_name(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


def skip_sin(graph: fx.Graph) -> int:
    by_name(graph, "sin").replace_all_uses_with(by_name(graph, "mul"))
    return 1


def test_a_pass_is_recorded_and_its_dead_code_goes() -> None:
    captured, history = net(), History()
    run_passes(captured.module, [Quiet(lambda graph: 0), Step(skip_sin)], history)
    quiet, step = history.records
    assert (quiet.name, quiet.changed, quiet.nodes_before) == ("quiet", 0, quiet.nodes_after)
    assert (step.changed, step.nodes_before - step.nodes_after, step.notes) == (1, 1, ("noted",))
    assert step.seconds > 0 and step.to_dict()["pass"] == "step"
    assert torch.equal(captured.module(tokens()), tokens() * 2 + 1)  # recompiled


def boom(graph: fx.Graph) -> int:
    raise KeyError("gone")


def drop_placeholder(graph: fx.Graph) -> int:
    old = by_name(graph, "x")
    with graph.inserting_before(old):
        new = graph.placeholder("y")
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    return 1


def change_dtype(graph: fx.Graph) -> int:
    output = next(node for node in graph.nodes if node.op == "output")
    last = output.args[0]
    with graph.inserting_before(output):
        cast = graph.call_method("float", (last,))
    cast.meta["example_value"] = last.meta["example_value"].float()
    output.args = (cast,)
    return 1


def two_outputs(graph: fx.Graph) -> int:
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], by_name(graph, "x")),)
    return 1


def read_before_write(graph: fx.Graph) -> int:
    by_name(graph, "mul").args = (by_name(graph, "sin"), 2)
    return 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (boom, "step failed after [quiet]: KeyError"),
        (drop_placeholder, "placeholders were removed or reordered"),
        (change_dtype, "output 0 was"),
        (two_outputs, "1 outputs became 2"),
        (read_before_write, "step failed after [quiet]"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(edit: Callable[[fx.Graph], int], words: str) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(net().module, [Quiet(lambda graph: 0), Step(edit)], History())
    assert words in str(caught.value)


def test_what_a_pass_ensures_is_checked() -> None:
    with pytest.raises(PassError, match="step broke the graph: the promise"):
        run_passes(net().module, [Step(lambda graph: 0, wrong=["the promise"])], History())


def test_added_placeholders_behind_the_others_are_fine() -> None:
    def add(graph: fx.Graph) -> int:
        with graph.inserting_after(by_name(graph, "x")):
            graph.placeholder("extra")
        return 1

    run_passes(net().module, [Step(add)], History())
