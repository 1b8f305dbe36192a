"""Turn `branch += stream` and `stream.copy_(stream + branch)` into values of their own, where nobody sees a difference.

Before:
    y = iadd(b, x)          b: made inside the graph, [batch, seq, hidden]; behind the write only y or b itself is read
    copy_(y, z)             z: looks like y, and was made for this write alone; `y[:] = z` likewise
After:
    y = add(b, x)           who read b behind the write reads y; who read y behind the second write reads z

Exact: the memory that was written was made inside the graph, no view or alias of it is read behind the write, and only
understood operations touch it, so only the result is observable. What the caller or a later reader can see (an input, a
view) is written in place as before, and FFNs around it are refused.
Source: several model families write their residual addition in place.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.effects import GraphEffects, graph_effects
from fxfusion.graph.pass_base import Pass, PassResult


class FunctionaliseAdds(Pass):
    name: ClassVar[str] = "functionalise_adds"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        effects = graph_effects(graph)
        gone: set[fx.Node] = set()
        # From the end, so that the facts, which are of the graph as it was, can only be too careful.
        for node in reversed(list(effects.of)):
            if len(effects.of[node].writes) != 1:
                continue
            (written,) = effects.of[node].writes
            value = _copied(node, written, effects, gone)
            if not (value or _is_sum(node, written)) or not effects.is_private(written):
                continue
            later = effects.late_readers(node, written)
            if any(value is not written for value in later.values()):
                continue
            made = value or GraphEditor(node, self.name, ()).call(operator.add, *node.args)
            effects.order.setdefault(made, effects.order[node])  # it reads where the node did
            for user in later:
                user.replace_input_with(written, made)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            gone.add(node)
        return PassResult(len(gone))


def _is_sum(node: fx.Node, written: fx.Node) -> bool:
    """`a += b`, in any spelling; also `add(a, b, out=a)`."""
    if ops.op_name(node) != "add" or len(node.args) != 2 or node.kwargs.keys() - {"out"} or written not in node.args:
        return False
    other = node.args[1] if written is node.args[0] else node.args[0]
    return _keeps_look(written, other) and (not node.kwargs or _look(node) == _look(written))


def _copied(node: fx.Node, written: fx.Node, effects: GraphEffects, gone: set[fx.Node]) -> fx.Node | None:
    """The value of `a.copy_(b)` or `a[:] = b`, where that is all of `a` for good, and was computed for that alone."""
    name, value = ops.op_name(node), node.args[-1] if node.args else None
    index = node.args[1] if name == "setitem" else slice(None)
    whole = all(step in (slice(None), Ellipsis) for step in (index if isinstance(index, tuple) else (index,)))
    if name not in ("copy", "setitem") or node.kwargs or written is not node.args[0] or not whole:
        return None
    if not isinstance(value, fx.Node) or list(value.users) != [node] or effects.modes[value] != effects.modes[node]:
        return None
    own = value.op.startswith("call") and effects.members(value) == [value] and not effects.writers_of(value)
    later = (write for write in effects.writers_of(written) if effects.order[write] > effects.order[node])
    return value if own and gone.issuperset(later) and _look(value) == _look(written) != () else None


def _look(node: fx.Node) -> tuple[object, ...]:
    value = ops.tensor_value(node)
    if value is None or value.layout != torch.strided:
        return ()
    return (*ops.shape_of(node), *map(str, value.stride()), value.dtype, value.device)


def _keeps_look(written: fx.Node, added: object) -> bool:
    """Whether a sum of its own would have the dtype and shape of the tensor written (writing never promotes)."""
    before = ops.tensor_value(written)
    other = ops.tensor_value(added) if isinstance(added, fx.Node) else added
    if before is None or not isinstance(other, (torch.Tensor, int, float)):
        return False
    return torch.result_type(before, other) == before.dtype
