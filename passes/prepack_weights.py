"""Let wide linear layers read weights in oneDNN's own layout.

Before:
    W = cat((W1, W2));  h = linear(n, W, b)                        W: [width_1 + width_2, hidden], tagged
After:
    W = cat((W1, W2));  P = pack_weight(W, tokens)                 P tagged instead, same shape, other order of bytes
    h = packed_linear(n, P, b)

Exact: the same products, summed by another kernel. Only for groups of form "prepacked" or "grouped_prepacked"; runs
before `lift_weights`, so that packing happens once and the dense wide weight is not kept.
Source: issue 5 (the fastest form of the wide FFN); `python -m bench.chain_speed` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

import fxfusion.graph.prepacked  # noqa: F401  (registers the operators)
from fxfusion.graph.editor import GraphEditor
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.passes.choose_form import tokens_to_pack_for
from fxfusion.passes.ffn import Group
from fxfusion.passes.pack_weights import PACK_TAG


class PrepackWeights(Pass):
    name: ClassVar[str] = "prepack_weights"
    exact: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)

    def run(self, graph: fx.Graph) -> PassResult:
        changed = 0
        for linear in list(graph.nodes):
            weight = linear.args[1] if linear.target is F.linear else None
            if not isinstance(weight, fx.Node) or PACK_TAG not in weight.meta:
                continue
            group = self.groups[weight.meta[PACK_TAG]]
            if group.is_prepacked:
                self._prepack(linear, weight, tokens_to_pack_for(group))
                changed += 1
        return PassResult(changed)

    def _prepack(self, linear: fx.Node, weight: fx.Node, tokens: int) -> None:
        editor = GraphEditor(linear, self.name, linear.meta.get("fxfusion", {}).get("from", ()))
        packed = editor.call(torch.ops.fxfusion.pack_weight.default, weight, tokens)
        packed.meta[PACK_TAG] = weight.meta.pop(PACK_TAG)
        bias = linear.args[2] if len(linear.args) > 2 else None
        result = editor.call(torch.ops.fxfusion.packed_linear.default, linear.args[0], packed, bias)
        linear.replace_all_uses_with(result)
        linear.graph.erase_node(linear)
