"""Find the FFNs that a plan or policy names: by layer number or by module path.

Matches (no edit):
    4, "model.layers.4.mlp"    ->    the FFN node of layer 4
Source: arXiv 2503.18908, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.graph.provenance import layer_numbers
from fxfusion.passes.ffn import FfnNode
from fxfusion.plan.fusion_plan import Member


class MemberIndex:
    """FFNs of one graph by module path and by layer number. `refused`: why others are none."""

    def __init__(self, ffns: Sequence[FfnNode], refused: Sequence[Refusal]) -> None:
        found: dict[Member, list[FfnNode]] = {}
        for ffn, layer in zip(ffns, layer_numbers([ffn.layer for ffn in ffns]), strict=True):
            found.setdefault(ffn.name, []).append(ffn)
            if layer is not None:
                found.setdefault(layer, []).append(ffn)
        self.by_name: Mapping[Member, list[FfnNode]] = found
        self.refused = refused

    def holds_any(self, names: Sequence[Member]) -> bool:
        """Whether one of the members is in this graph."""
        return any(name in self.by_name for name in names)

    def one(self, name: Member) -> FfnNode:
        """The FFN of that name. Raises `Refused` unless there is exactly one."""
        found = self.by_name.get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(ffn.name for ffn in found)
            raise Refused(RefusalCode.PLAN_UNMATCHED, f"{name!r} means several FFNs ({paths}); name one by its path")
        message = f"{name!r} holds no FFN of this graph{self._known()}{self.why(name)}"
        raise Refused(RefusalCode.PLAN_UNMATCHED, message)

    def absent(self, what: str, names: Sequence[Member]) -> str:
        """Why none of a group's members is here: refused, in another graph, or not in the model at all."""
        why = next((why for name in names if (why := self.why(name))), "")
        return f"{what} {list(names)}: none of them holds an FFN of this graph{self._known()}{why}"

    def _known(self) -> str:
        known = sorted(key for key in self.by_name if isinstance(key, int))
        return f"; FFNs were found in layers {known}" if known else ""

    def why(self, name: Member) -> str:
        """Why the name holds no FFN that can be used, in brackets; empty where nothing is known."""
        found = [refusal for refusal in self.refused if _is_about(refusal, name)]
        others = [refusal for refusal in found if refusal.code is not RefusalCode.TOKEN_MIXING]  # not attention
        reason = next(iter(others or found[::-1]), None)
        return f" ({reason.code.value}: {reason.message})" if reason is not None else ""


def _is_about(refusal: Refusal, name: Member) -> bool:
    return refusal.layer == name or (isinstance(name, int) and str(name) in refusal.layer.split("."))
