"""Choose groups: by a policy over whole chains, or exactly those of a plan.

Matches (no edit):
    chain F0 F1 F2 F3 F4, policy include_leading=False, keep_last=1    ->    group (F1 F2 F3)
    chain F0 F1 F2 F3 F4, plan groups [[1, 2]]                         ->    group (F1 F2)
Every member of a chain that ends up in no group gets a refusal that names the rule or the difference.
Source: issue 2; arXiv 2503.18908, section 3 (which FFNs of a run are fused).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.graph.provenance import layer_numbers
from fxfusion.passes.check_group import GroupChecker
from fxfusion.passes.ffn import Chain, FfnNode, Group
from fxfusion.plan import FusionPlan, Member
from fxfusion.policy import FusionPolicy

Planned = tuple[tuple[Group, ...], tuple[Refusal, ...]]


def plan_by_policy(chains: Sequence[Chain], policy: FusionPolicy, checker: GroupChecker) -> Planned:
    """Groups of every chain under the policy."""
    groups: list[Group] = []
    refusals: list[Refusal] = []
    for chain in chains:
        members, left_out = _eligible(chain, policy)
        refusals += left_out
        for run, reason in _compatible_runs(members, policy, checker):
            if len(run) >= policy.min_members:
                groups.append(checker.group(run, policy.norm))
            elif len(run) > 1 or reason is None:
                words = f"{len(run)} of this chain's FFNs fit together, min_members is {policy.min_members}"
                refusals += [_refusal(ffn, reason or Refused(RefusalCode.POLICY, words)) for ffn in run]
            else:
                refusals += [_refusal(ffn, reason) for ffn in run]
    return tuple(groups), tuple(refusals)


def _eligible(chain: Chain, policy: FusionPolicy) -> tuple[list[FfnNode], list[Refusal]]:
    """The members that the policy lets in, and refusals for the others."""
    members, refusals = list(chain.members), []
    if chain.leading and not policy.include_leading:
        words = "the first FFN after a mixer, in the mixer's own layer; include_leading is False"
        refusals.append(_refusal(members.pop(0), Refused(RefusalCode.POLICY, words)))
    for _ in range(min(policy.keep_last, len(members))):
        words = f"among the last {policy.keep_last} of its chain; keep_last is {policy.keep_last}"
        refusals.append(_refusal(members.pop(), Refused(RefusalCode.POLICY, words)))
    return members, refusals


def _compatible_runs(
    members: Sequence[FfnNode], policy: FusionPolicy, checker: GroupChecker
) -> Iterator[tuple[list[FfnNode], Refused | None]]:
    """Cut a chain where neighbours do not fit each other or a limit is reached, with the reason."""
    run: list[FfnNode] = []
    before: Refused | None = None
    for ffn in members:
        reason = _over_limit(run, ffn, policy) or _fused_before([*run, ffn]) or checker.misfit(run, ffn, policy.norm)
        if reason is None:
            run.append(ffn)
            continue
        if run:
            yield run, before or reason
        run, before = [ffn], reason
        alone = checker.misfit([], ffn, policy.norm)
        if alone is not None:
            yield run, alone
            run, before = [], None
    if run:
        yield run, before


def _over_limit(run: Sequence[FfnNode], ffn: FfnNode, policy: FusionPolicy) -> Refused | None:
    if policy.max_members is not None and len(run) >= policy.max_members:
        return Refused(RefusalCode.POLICY, f"the group before it is full; max_members is {policy.max_members}")
    if policy.max_width is not None and sum(other.width for other in run) + ffn.width > policy.max_width:
        return Refused(RefusalCode.POLICY, f"the group would be wider than max_width {policy.max_width}")
    return None


def _fused_before(members: Sequence[FfnNode]) -> Refused | None:
    """A policy leaves what an earlier run made as it is, so that fusing twice is fusing once; a plan may name it."""
    for ffn in members:
        if ffn.add.meta.get("fxfusion", {}).get("pass") == "concatenate":
            return Refused(RefusalCode.POLICY, f"{ffn.name} is the work of an earlier fusion")
    return None


def plan_by_plan(
    chains: Sequence[Chain],
    ffns: Sequence[FfnNode],
    refused: Sequence[Refusal],
    plan: FusionPlan,
    checker: GroupChecker,
) -> Planned:
    """Exactly the plan's groups; a group that cannot be had is refused, with the member at fault."""
    if not ffns:
        return (), ()
    index = _Index(chains, ffns, refused)
    groups: list[Group] = []
    refusals: list[Refusal] = []
    for number, names in enumerate(plan.groups):
        if not any(name in index.by_name for name in names):
            refusals.append(Refusal(code=RefusalCode.PLAN_ABSENT, message=index.absent(number, names)))
            continue
        try:
            members = index.neighbours(names)
            for end, ffn in enumerate(members):
                misfit = checker.misfit(members[:end], ffn, plan.norm)
                if misfit is not None:
                    raise Refused(misfit.code, f"{ffn.name}: {misfit.message}")
            groups.append(checker.group(members, plan.norm))
        except Refused as error:
            message = f"group {number} {list(names)}: {error.message}"
            refusals.append(Refusal(code=RefusalCode.PLAN_UNMATCHED, message=message))
    chosen = {ffn.add for group in groups for ffn in group.members}
    not_chosen = Refused(RefusalCode.NOT_IN_PLAN, "no group of the plan names it")
    refusals += [_refusal(ffn, not_chosen) for chain in chains for ffn in chain.members if ffn.add not in chosen]
    return tuple(groups), tuple(refusals)


class _Index:
    """FFNs of one graph by module path and by layer number."""

    def __init__(self, chains: Sequence[Chain], ffns: Sequence[FfnNode], refused: Sequence[Refusal]) -> None:
        self.place = {ffn.add: (c, m) for c, chain in enumerate(chains) for m, ffn in enumerate(chain.members)}
        self.by_name: Mapping[Member, list[FfnNode]] = {}
        found: dict[Member, list[FfnNode]] = {}
        for ffn, layer in zip(ffns, layer_numbers([ffn.layer for ffn in ffns]), strict=True):
            found.setdefault(ffn.name, []).append(ffn)
            if layer is not None:
                found.setdefault(layer, []).append(ffn)
        self.by_name = found
        self.refused = refused

    def neighbours(self, names: Sequence[Member]) -> list[FfnNode]:
        """The named FFNs in graph order. Raises `Refused` unless they are neighbours in one chain."""
        members = [self._one(name) for name in names]
        places = {ffn.add: self.place.get(ffn.add) for ffn in members}
        for name, ffn in zip(names, members, strict=True):
            if places[ffn.add] is None:
                raise Refused(RefusalCode.PLAN_UNMATCHED, f"{name!r} is in no chain{self._why(name)}")
        ordered = sorted(members, key=lambda ffn: self.place[ffn.add])
        spots = [self.place[ffn.add] for ffn in ordered]
        for one, other in zip(spots, spots[1:], strict=False):
            if (one[0], one[1] + 1) != other:
                raise Refused(RefusalCode.PLAN_UNMATCHED, "its members are not neighbours in one chain")
        return ordered

    def _one(self, name: Member) -> FfnNode:
        found = self.by_name.get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(ffn.name for ffn in found)
            raise Refused(RefusalCode.PLAN_UNMATCHED, f"{name!r} means several FFNs ({paths}); name one by its path")
        message = f"{name!r} holds no FFN of this graph{self._known()}{self._why(name)}"
        raise Refused(RefusalCode.PLAN_UNMATCHED, message)

    def absent(self, number: int, names: Sequence[Member]) -> str:
        """Why none of a group's members is here: refused, in another graph, or not in the model at all."""
        why = next((why for name in names if (why := self._why(name))), "")
        return f"group {number} {list(names)}: none of them holds an FFN of this graph{self._known()}{why}"

    def _known(self) -> str:
        known = sorted(key for key in self.by_name if isinstance(key, int))
        return f"; FFNs were found in layers {known}" if known else ""

    def _why(self, name: Member) -> str:
        for refusal in self.refused:
            steps = refusal.layer.split(".")
            if refusal.layer == name or (isinstance(name, int) and str(name) in steps):
                return f" ({refusal.code.value}: {refusal.message})"
        return ""


def _refusal(ffn: FfnNode, reason: Refused) -> Refusal:
    return Refusal(code=reason.code, message=reason.message, node=ffn.add.name, layer=ffn.name, source=ffn.source)
