"""Write out operations that, in eval mode or for one parameter, compute what simpler ones do.

Before:
    y = _transformer_encoder_layer_fwd(x, ..., norm_first=True, ..., mask=None)            x, y: [batch, seq, hidden]
    a = prelu(h, w)                                            h: [..., width]; w: [1], or [width] where h has two axes
    r = rrelu(a, lower, upper, training=False)
    b = batch_norm(r, mean, var, gain, shift, training=False)  r: [tokens, width], or [batch, width, seq], a transpose
After:
    q, k, v = LN1(x) Wqkv^T + bqkv;  x1 = x + attention(q, k, v) Wo^T + bo
    y = x1 + act(LN2(x1) W1^T + b1) W2^T + b2
    a = where(h > 0, h, w * h)
    r = leaky_relu(a, (lower + upper) / 2)
    g = gain * rsqrt(var + eps);  b = r * g + (shift - mean * g)         on the last axis; the transposes cancel

Exact up to rounding: the operations are defined so. What they do in training, a slope for each place of another axis
than the last, and encoder layers with a mask, norms on the stream or a symbolic width stay (layers are refused).
Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html (eval mode);
torch.nn.TransformerEncoderLayer, "fast path".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.graph.torch_private import OpOverload

LAYER = "_transformer_encoder_layer_fwd"
_LAYER_ARGUMENTS = (
    "src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps "
    "norm_weight_1 norm_bias_1 norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2 ffn_bias_2 mask mask_type"
).split()
_ATEN_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()
_FUNCTIONAL_NORM = "input running_mean running_var weight bias training momentum eps".split()
_RRELU = {"rrelu": 1, "rrelu_with_noise": 2, "rrelu_with_noise_functional": 2}  # where the bounds stand


class WriteOut(Pass):
    name: ClassVar[str] = "write_out"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        for node in list(graph.nodes):
            name = ops.op_name(node)
            write = _batch_norm if "batch_norm" in name else _WRITERS.get(name)
            written = write(GraphEditor(node, self.name, ()), node) if write else None
            changed += written is not None and _replace(node, written)
        return PassResult(changed)


def _layer(editor: GraphEditor, node: fx.Node) -> fx.Node | None:
    given: dict[str, Any] = dict(zip(_LAYER_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    if given["norm_first"] is not True or given.get("mask") is not None or len(ops.shape_of(node)) != 3:
        return None
    if ops.shape_of(node)[-1] != str(given["embed_dim"]):  # a symbol, which the layer norm would turn into a number
        return None

    def normed(value: fx.Node, place: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{place}"], given[f"norm_bias_{place}"]
        return editor.call(F.layer_norm, value, (given["embed_dim"],), weight, bias, given["eps"])

    x, heads = given["src"], (given["num_heads"], given["embed_dim"] // given["num_heads"])
    projected = editor.call(F.linear, normed(x, 1), given["qkv_weight"], given["qkv_bias"])
    parts = editor.method("chunk", projected, 3, -1)
    split = (editor.method("unflatten", editor.call(operator.getitem, parts, place), -1, heads) for place in range(3))
    attended = editor.call(F.scaled_dot_product_attention, *[editor.method("transpose", part, 1, 2) for part in split])
    joined = editor.method("flatten", editor.method("transpose", attended, 1, 2), -2)
    x = editor.call(operator.add, x, editor.call(F.linear, joined, given["proj_weight"], given["proj_bias"]))
    hidden = editor.call(F.linear, normed(x, 2), given["ffn_weight_1"], given["ffn_bias_1"])
    active = editor.call(F.gelu if given["use_gelu"] else F.relu, hidden)
    return editor.call(operator.add, x, editor.call(F.linear, active, given["ffn_weight_2"], given["ffn_bias_2"]))


def _prelu(editor: GraphEditor, node: fx.Node) -> fx.Node | None:
    value, slope = ops.argument(node, 0, "input"), ops.argument(node, 1, "weight")
    before, example = ops.tensor_value(value), ops.tensor_value(slope)
    if before is None or example is None or example.numel() > 1 and before.dim() != 2:
        return None
    if example.dtype != before.dtype:
        slope = editor.method("to", slope, before.dtype)
    positive = editor.call(operator.gt, value, 0)
    return editor.call(torch.where, positive, value, editor.call(operator.mul, slope, value))


def _rrelu(editor: GraphEditor, node: fx.Node) -> fx.Node | None:
    place = _RRELU[ops.op_name(node)]
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


_WRITERS: Mapping[str, Callable[[GraphEditor, fx.Node], fx.Node | None]] = {
    LAYER: _layer,
    "prelu": _prelu,
    **dict.fromkeys(_RRELU, _rrelu),
}
