"""Turn the numbers that a module holds, which Dynamo makes inputs of the graph, into literals again.

Before:
    e = eps.item();  v = add(variance, e)          eps: an input, read off a module; one for each norm
After:
    v = add(variance, 1e-06)                       guarded, so another eps is compiled anew

Exact, under the guard. Without it members could not be compared: each norm has an eps of its own, and two inputs may
differ. Dynamo does so under `dynamic=True`, and once it saw a second value; numbers of other objects and of global
variables are as those of modules. Whether FFNs fuse depends on what the numbers are now, so they are guarded where two
FFNs are, or could be under other numbers, fused or not. Numbers that the caller passes stay inputs. Graphs are left as
they are outside of a Dynamo compile, where nobody would look at a guard.
Source: `torch.compile(dynamic=True)` makes numbers of modules inputs of the graph.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from fxfusion.graph.editor import write_out
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.graph.torch_private import held_number


class SpecialiseNumbers(Pass):
    name: ClassVar[str] = "specialise_numbers"
    exact: ClassVar[bool] = True
    settles: ClassVar[bool] = True  # a dropout of 0.0 draws nothing

    def __init__(self) -> None:
        self.numbers: list[torch.SymFloat] = []

    def run(self, graph: fx.Graph) -> PassResult:
        self.numbers = []
        for node in list(graph.nodes):
            found = held_number(node) if node.target == "item" else None
            if found is not None:
                number, value = found
                self.numbers.append(number)
                write_out(node, value)
            elif self.numbers and _is_arithmetic(node):
                write_out(node, node.target(*node.args, **node.kwargs))
        return PassResult(len(self.numbers))

    def guard(self) -> None:
        """Let the compiled graph be used only where the numbers are what they were in `run`."""
        for number in self.numbers:
            float(number)  # Dynamo notes who asks for the value


def _is_arithmetic(node: fx.Node) -> bool:
    """Whether the node computes with literals only, as `1 - 0.5` is left behind."""
    module = getattr(node.target, "__module__", "")
    return node.op == "call_function" and not node.all_input_nodes and module in ("_operator", "math", "builtins")
