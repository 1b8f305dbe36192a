"""Turn `branch += stream` and `stream += branch` into sums, where nobody can see the difference.

Before:
    y = iadd(b, x)          b: made inside the graph, [batch, seq, hidden]; behind the write only y or b itself is read
After:
    y = add(b, x)           who read b behind the write reads y

Exact: the memory that was written was made inside the graph, no view or alias of it is read behind the write, and only
understood operations touch it, so only the result is observable. What the caller or a later reader can see (an input, a
view) is written in place as before, and FFNs around it are refused.
Source: issue 2; several model families write their residual addition in place.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.effects import graph_effects
from fxfusion.graph.pass_base import Pass, PassResult


class FunctionaliseAdds(Pass):
    name: ClassVar[str] = "functionalise_adds"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        effects = graph_effects(graph)
        changed = 0
        # From the end, so that the facts, which are of the graph as it was, can only be too careful.
        for node in reversed(list(effects.of)):
            if ops.op_name(node) != "add" or len(node.args) != 2 or node.kwargs or len(effects.of[node].writes) != 1:
                continue
            (written,) = effects.of[node].writes
            if written is not node.args[0] or not _keeps_look(written, node.args[1]):
                continue
            later = effects.late_readers(node, written)
            if not effects.is_private(written) or any(value is not written for value in later.values()):
                continue
            added = GraphEditor(node, self.name, ()).call(operator.add, *node.args)
            for user in later:
                user.replace_input_with(written, added)
            node.replace_all_uses_with(added)
            graph.erase_node(node)
            changed += 1
        return PassResult(changed)


def _keeps_look(written: fx.Node, added: object) -> bool:
    """Whether a sum of its own would have the dtype and shape of the tensor written (writing never promotes)."""
    before = ops.tensor_value(written)
    other = ops.tensor_value(added) if isinstance(added, fx.Node) else added
    if before is None or not isinstance(other, (torch.Tensor, int, float)):
        return False
    return torch.result_type(before, other) == before.dtype
