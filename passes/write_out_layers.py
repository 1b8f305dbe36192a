"""Write out the one operation that stands for a whole layer of `nn.TransformerEncoder` in eval mode.

Before:
    y = _transformer_encoder_layer_fwd(x, ..., norm_first=True, ..., mask=None)            x, y: [batch, seq, hidden]
After:
    q, k, v = LN1(x) Wqkv^T + bqkv;  x1 = x + attention(q, k, v) Wo^T + bo
    y = x1 + act(LN2(x1) W1^T + b1) W2^T + b2

Exact up to rounding. Layers with a mask, or with their norms on the stream, stay as they are, and are refused.
Source: issue 13; torch.nn.TransformerEncoderLayer, "fast path".
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult

LAYER = "_transformer_encoder_layer_fwd"
_GIVEN = (
    "src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps "
    "norm_weight_1 norm_bias_1 norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2 ffn_bias_2 mask mask_type"
).split()


class WriteOutLayers(Pass):
    name: ClassVar[str] = "write_out_layers"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        for node in list(graph.nodes):
            if ops.op_name(node) != LAYER:
                continue
            given: dict[str, Any] = dict(zip(_GIVEN, node.args, strict=False)) | dict(node.kwargs)
            example = ops.tensor_value(node)
            if given["norm_first"] is True and given.get("mask") is None and example is not None and example.dim() == 3:
                node.replace_all_uses_with(_written_out(GraphEditor(node, self.name, ()), given))
                graph.erase_node(node)
                changed += 1
        return PassResult(changed)


def _written_out(editor: GraphEditor, given: dict[str, Any]) -> fx.Node:
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
