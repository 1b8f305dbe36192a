"""Recognise one linear layer, in whatever spelling.

Matches (no edit):
    linear(x, W, b)              W: [out, in]
    addmm(b, x, W), x @ W        W: [in, out]   (Conv1D, hand-written)
    x @ W.T                      W: [out, in]
where W and b are constants (parameters, or computed from parameters alone) and W stands on the right.
A constant on the left, `W @ x`, mixes tokens and is no linear layer.
Source: the spellings that Dynamo, torch.export and symbolic traces record.
"""

from __future__ import annotations

from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.passes.ffn import Linear

_TRANSPOSES = frozenset(("t", "T", "mT"))


def match_linear(node: fx.Node, facts: GraphFacts) -> Linear | None:
    """The linear layer that the node computes, or None."""
    name = ops.op_name(node)
    if name == "linear":
        operands = ops.argument(node, 0, "input"), ops.argument(node, 1, "weight"), ops.argument(node, 2, "bias")
        return _linear(node, operands, facts, transposed=False)
    if name == "addmm" and not set(node.kwargs) - {"input", "mat1", "mat2"}:
        operands = ops.argument(node, 1, "mat1"), ops.argument(node, 2, "mat2"), ops.argument(node, 0, "input")
        return _linear(node, operands, facts, transposed=True)
    if name in ("matmul", "mm"):
        second = "mat2" if name == "mm" else "other"
        operands = ops.argument(node, 0, "input"), ops.argument(node, 1, second), None
        return _linear(node, operands, facts, transposed=True)
    return None


def _linear(
    node: fx.Node, operands: tuple[object, object, object], facts: GraphFacts, *, transposed: bool
) -> Linear | None:
    value, weight, bias = operands
    if not isinstance(value, fx.Node) or value in facts.constants:
        return None
    if not isinstance(weight, fx.Node) or weight not in facts.constants:
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or bias not in facts.constants):
        return None
    if transposed and _is_transpose(weight):
        weight, transposed = weight.all_input_nodes[0], False
    example = ops.tensor_value(weight)
    if example is None or example.dim() != 2 or not all(isinstance(size, int) for size in example.shape):
        return None
    if not example.is_floating_point() or (isinstance(bias, fx.Node) and len(ops.shape_of(bias)) != 1):
        return None
    rows, columns = example.shape
    return Linear(
        node=node,
        input=value,
        weight=weight,
        bias=bias,
        transposed=transposed,
        in_features=rows if transposed else columns,
        out_features=columns if transposed else rows,
    )


def _is_transpose(node: fx.Node) -> bool:
    name = ops.op_name(node)
    if name == "getattr":
        return node.args[1] in ("T", "mT")
    if name == "transpose":
        return {ops.argument(node, 1, "dim0"), ops.argument(node, 2, "dim1")} in ({0, 1}, {-1, -2})
    if name == "permute":
        return list(ops.nodes_of(node.args[1:])) == [] and _flat(node.args[1:]) in ([1, 0], [-1, -2])
    return name in _TRANSPOSES


def _flat(value: object) -> list[object]:
    if isinstance(value, (tuple, list)):
        return [item for part in value for item in _flat(part)]
    return [value]
