"""Turn `branch += stream` into `branch + stream`, where nobody can see the difference.

Before:
    y = iadd(b, x)          b: a fresh tensor that nobody else reads, [batch, seq, hidden]
After:
    y = add(b, x)

Exact: the written tensor was made inside the graph and has no other reader or alias, so only the
result is observable. `iadd(x, b)` on a stream that others read stays as it is, and is refused later.
Source: issue 2; several model families write their residual addition in place.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult


class FunctionaliseAdds(Pass):
    name: ClassVar[str] = "functionalise_adds"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        for node in list(graph.nodes):
            if ops.op_name(node) != "add" or not ops.writes_in_place(node) or len(node.args) != 2:
                continue
            written = ops.written_argument(node)
            if written is None or node.kwargs or not _is_private(written) or not _keeps_look(written, node.args[1]):
                continue
            added = GraphEditor(node, self.name, ()).call(operator.add, *node.args)
            node.replace_all_uses_with(added)
            graph.erase_node(node)
            changed += 1
        return PassResult(changed)


def _is_private(node: fx.Node) -> bool:
    """Whether the value, and every value it is a view of, has one reader and was made in the graph."""
    while len(node.users) == 1:
        if ops.op_name(node) not in ops.ALIASING_OPS:
            return node.op in ("call_function", "call_method") and not ops.writes_in_place(node)
        node = node.all_input_nodes[0]
    return False


def _keeps_look(written: fx.Node, added: object) -> bool:
    """Whether a sum of its own would have the dtype and shape of the tensor written (writing never promotes)."""
    before = ops.tensor_value(written)
    other = ops.tensor_value(added) if isinstance(added, fx.Node) else added
    if before is None or not isinstance(other, (torch.Tensor, int, float)):
        return False
    return torch.result_type(before, other) == before.dtype
