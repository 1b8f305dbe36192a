"""Write out operations that are pointwise in eval mode, or for one parameter, as what they then compute.

Before:
    a = prelu(h, w)                                            h: [..., width]; w: [1], or [width] where h has two axes
    r = rrelu(a, lower, upper, training=False)
    b = batch_norm(r, mean, var, gain, shift, training=False)  r: [tokens, width], or [batch, width, seq], a transpose
After:
    a = where(h > 0, h, w * h)
    r = leaky_relu(a, (lower + upper) / 2)
    g = gain * rsqrt(var + eps);  b = r * g + (shift - mean * g)         on the last axis; the transposes cancel

Exact up to rounding: `aten::prelu`, `aten::rrelu` and `aten::batch_norm` are defined so. What they do in training, and
a slope for each place of another axis than the last, is left as it is.
Source: issue 13; https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html (eval mode).
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.graph.torch_private import OpOverload

_ATEN_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()
_FUNCTIONAL_NORM = "input running_mean running_var weight bias training momentum eps".split()
_RRELU = {"rrelu": 1, "rrelu_with_noise": 2, "rrelu_with_noise_functional": 2}  # where the bounds stand


class WriteOutPointwise(Pass):
    name: ClassVar[str] = "write_out_pointwise"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        for node in list(graph.nodes):
            name = ops.op_name(node)
            if name == "prelu":
                written = _prelu(GraphEditor(node, self.name, ()), node)
            elif name in _RRELU:
                written = _rrelu(GraphEditor(node, self.name, ()), node, _RRELU[name])
            elif "batch_norm" in name:
                written = _batch_norm(GraphEditor(node, self.name, ()), node)
            else:
                continue
            changed += written is not None and _replace(node, written)
        return PassResult(changed)


def _prelu(editor: GraphEditor, node: fx.Node) -> fx.Node | None:
    value, slope = ops.argument(node, 0, "input"), ops.argument(node, 1, "weight")
    before, example = ops.tensor_value(value), ops.tensor_value(slope)
    if before is None or example is None or example.numel() > 1 and before.dim() != 2:
        return None
    if example.dtype != before.dtype:
        slope = editor.method("to", slope, before.dtype)
    positive = editor.call(operator.gt, value, 0)
    return editor.call(torch.where, positive, value, editor.call(operator.mul, slope, value))


def _rrelu(editor: GraphEditor, node: fx.Node, place: int) -> fx.Node | None:
    lower, upper = ops.argument(node, place, "lower", 1 / 8), ops.argument(node, place + 1, "upper", 1 / 3)
    training = ops.argument(node, place + 2, "training", False)
    bounds = all(isinstance(end, (int, float)) for end in (lower, upper))
    if training is not False or not bounds or ops.argument(node, place + 3, "inplace", False) not in (False, None):
        return None
    return editor.call(F.leaky_relu, node.args[0], (lower + upper) / 2)


def _batch_norm(editor: GraphEditor, node: fx.Node) -> fx.Node | None:
    given = _norm_arguments(node)
    value, mean, variance = given.get("input"), given.get("running_mean"), given.get("running_var")
    example = ops.tensor_value(value)
    if given.get("training", False) is not False or example is None or ops.tensor_value(variance) is None:
        return None
    assert isinstance(value, fx.Node)
    swapped = example.dim() == 3 and _swaps(value)
    if example.dim() != 2 and not swapped:
        return None
    deviation = editor.call(torch.rsqrt, editor.call(operator.add, variance, given.get("eps", 1e-5)))
    gain = _times(editor, deviation, given.get("weight"))
    shift = editor.method("neg", editor.call(operator.mul, mean, gain))
    if given.get("bias") is not None:
        shift = editor.call(operator.add, given["bias"], shift)
    source = value.args[0] if swapped else value
    made = editor.call(operator.add, editor.call(operator.mul, source, gain), shift)
    if getattr(ops.tensor_value(made), "dtype", example.dtype) != example.dtype:
        made = editor.method("to", made, example.dtype)
    return editor.method("transpose", made, 1, 2) if swapped else made


def _times(editor: GraphEditor, value: fx.Node, factor: fx.Node | None) -> fx.Node:
    return value if factor is None else editor.call(operator.mul, factor, value)


def _norm_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments by ATen's names; empty where the node is no batch norm that can be read."""
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    elif node.target is F.batch_norm:
        names = _FUNCTIONAL_NORM
    elif node.target is torch.batch_norm:
        names = _ATEN_NORM
    else:
        return {}
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return given | {"eps": given["epsilon"]} if "epsilon" in given else given


def _swaps(node: Any) -> bool:
    """Whether a value of three axes is another one with its last two exchanged."""
    name = ops.op_name(node)
    if name == "transpose":
        return sorted(dim % 3 for dim in node.args[1:3] if isinstance(dim, int)) == [1, 2]
    if name == "permute":
        order = node.args[1] if len(node.args) == 2 else node.args[1:]
        return isinstance(order, (list, tuple)) and [isinstance(dim, int) and dim % 3 for dim in order] == [0, 2, 1]
    return name in ("mT", "adjoint") or name == "getattr" and node.args[1] == "mT"


def _replace(node: fx.Node, written: fx.Node) -> bool:
    """Let the readers read what was written out: the first result, where the node has several."""
    if isinstance(ops.example(node), (tuple, list)):
        readers = list(node.users)
        if any(ops.op_name(user) != "getitem" or user.args[1] != 0 for user in readers):
            return False
    else:
        readers = [node]
    for reader in readers:
        for user in list(reader.users):
            if _swaps(written) and _swaps(user) and user.args[0] is reader:
                user.replace_all_uses_with(written.all_input_nodes[0])
                user.graph.erase_node(user)
        reader.replace_all_uses_with(written)
        reader.graph.erase_node(reader)
    if readers != [node]:
        node.graph.erase_node(node)
    return True
