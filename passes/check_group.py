"""Do FFNs fit into one group? The rules that no single FFN can answer for itself.

Matches (no edit):
    same operations, literals and dtypes from stream to branch; widths and weights may differ
    norm="fold": constants that differ between members are proved gains or shifts, or per channel
    no weight stands at two places of the group or is read outside the FFNs of the graph
Source: arXiv 2503.18908, theorem 3.1 (the sum of FFNs that read one input).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.isomorphism import first_difference
from fxfusion.passes.ffn import Branch, FfnNode, Group, Role
from fxfusion.passes.match_residual import weight_leaves
from fxfusion.passes.prove_norm import NormProver
from fxfusion.plan.policy import NormMode


class GroupChecker:
    """Answers for one graph. `ffns`: every FFN that the matcher found in it."""

    def __init__(self, facts: GraphFacts, ffns: Sequence[FfnNode]) -> None:
        self.facts = facts
        self.prover = NormProver()
        self._inside = {node for ffn in ffns for node in ffn.nodes}

    def misfit(self, run: Sequence[FfnNode], ffn: FfnNode, norm: NormMode) -> Refused | None:
        """Why the FFN cannot join the run (or start one, where it is empty); None when it can.

        `run` and the FFN are of one chain, so all of them read and write one stream.
        """
        leaves = (leaf for weight in ffn.weights for leaf in weight_leaves(weight, self.facts))
        outside = reader_outside(leaves, self._inside, self.facts)
        if outside is not None:
            return Refused(RefusalCode.SHARED_WEIGHT, f"a weight of it is also read by {outside}, outside the FFNs")
        if not run:
            return self._shared_within([ffn])
        assert ffn.hidden == run[0].hidden, "two streams"
        different = first_difference(ffn.structure, run[0].structure)
        if different is not None:
            code, words = different
            return Refused(code, f"differs from {run[0].name}: {words}")
        return self._shared_within([*run, ffn]) or self._constants([*run, ffn], norm)

    def check_fit(self, members: Sequence[FfnNode], norm: NormMode) -> None:
        """Raises `Refused` unless the FFNs fit into one group."""
        for end, ffn in enumerate(members):
            misfit = self.misfit(members[:end], ffn, norm)
            if misfit is not None:
                raise Refused(misfit.code, f"{ffn.name}: {misfit.message}")

    def make_group(self, members: Sequence[FfnNode], norm: NormMode) -> Group:
        """The group of members that fit."""
        return Group(members=tuple(members), norm=norm, roles=self._roles(members, norm))

    def _roles(self, members: Sequence[FfnNode], norm: NormMode) -> tuple[Role, ...]:
        """What happens to each constant of the prologue: kept as it is where the members share it."""
        if norm == "last":
            return tuple("fixed" for _ in members[0].prologue_constants)
        return fold_roles(members, self.prover)

    def _constants(self, members: Sequence[FfnNode], norm: NormMode) -> Refused | None:
        """Constants that differ between members must be foldable, or lie side by side."""
        try:
            self._roles(members, norm)
        except Refused as refused:
            return refused
        return members[0].middle_kind.misfit_of(members)

    def _shared_within(self, members: Sequence[FfnNode]) -> Refused | None:
        seen: dict[fx.Node, FfnNode] = {}
        for ffn in members:
            for weight in ffn.weights:
                for leaf in weight_leaves(weight, self.facts):
                    if leaf in seen:
                        return Refused(
                            RefusalCode.SHARED_WEIGHT, f"{ffn.name} and {seen[leaf].name} use one weight ({leaf})"
                        )
                    seen[leaf] = ffn
        return None


def reader_outside(leaves: Iterable[fx.Node], inside: Container[fx.Node], facts: GraphFacts) -> fx.Node | None:
    """A node that is not inside and reads one of the weights, also through views and casts of it."""
    constants = facts.constants
    reached = ops.reached(leaves, lambda node: [user for user in node.users if user in constants])
    users = (user for node in reached for user in node.users)
    return next((user for user in users if user not in constants and user not in inside), None)


def fold_roles(members: Sequence[Branch], prover: NormProver) -> tuple[Role, ...]:
    """What happens to each constant of the norms when they are folded: kept as it is ("fixed") where all share it.

    Raises `Refused` where another one is neither a proved gain nor a proved shift.
    """
    proved = prover.roles(members[0])
    shared = [
        all(member.prologue_constants[index] is constant for member in members)
        for index, constant in enumerate(members[0].prologue_constants)
    ]
    # A gain that leaves the norm must not leave a shift behind it: (n + s) * g is not n * g + s.
    gain_goes = any(role == "gain" and not same for role, same in zip(proved, shared, strict=True))
    roles: list[Role] = []
    for role, same in zip(proved, shared, strict=True):
        if role == "fixed" and not same:
            words = f"{members[-1].prologue_constants[len(roles)]} of its norm is not proved to be a gain or a shift"
            raise Refused(RefusalCode.NORM_UNPROVED, words)
        stays = same and not (role == "shift" and gain_goes)
        roles.append("fixed" if stays else role)
    return tuple(roles)
