"""Turn the numbers that a module holds, which `dynamic=True` makes inputs of the graph, into literals again.

Before:
    e = eps.item();  v = add(variance, e)          eps: an input, read off a module; one for each norm
After:
    v = add(variance, 1e-06)                       once something is fused: guarded, so another eps is compiled anew

Exact, under the guard. Without it members could not be compared: each norm has an eps of its own, and two inputs may
differ. Numbers that the caller passes stay inputs. Graphs are left as they are outside of a Dynamo compile, where
nobody would look at a guard.
Source: issue 7 (grouped under `torch.compile(dynamic=True)`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from fxfusion.graph.editor import write_out
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.torch_private import module_number


class SpecialiseNumbers(Pass):
    name: ClassVar[str] = "specialise_numbers"
    exact: ClassVar[bool] = True
    settles: ClassVar[bool] = True  # a dropout of 0.0 draws nothing

    def __init__(self) -> None:
        self.numbers: list[torch.SymFloat] = []

    def are_in(self, graph: fx.Graph) -> bool:
        """Whether there is something to do: most graphs hold no such number."""
        return any([module_number(node) is not None for node in graph.nodes if node.target == "item"])

    def run(self, graph: fx.Graph) -> PassResult:
        self.numbers = []
        for node in list(graph.nodes):
            found = module_number(node)
            if found is not None:
                number, value = found
                self.numbers.append(number)
                write_out(node, value)
        return PassResult(len(self.numbers))

    def guard(self) -> None:
        """Let the compiled graph be used only where the numbers are what they were in `run`."""
        for number in self.numbers:
            float(number)  # Dynamo notes who asks for the value
