"""Choose groups: by a policy over whole chains, or exactly those of a plan.

Matches (no edit):
    chain F0 F1 F2 F3 F4, policy include_leading=False, keep_last=1    ->    group (F1 F2 F3)
    chain F0 F1 F2 F3 F4, plan groups [[1, 2]]                         ->    group (F1 F2)
    chain F0 F1 F2 F3 F4, window [1, 2] hoisted, default policy        ->    groups (F1 F2), (F3 F4)
Every member of a chain that ends up in no group gets a refusal that names the rule or the difference.
Source: arXiv 2503.18908, section 3 (which FFNs of a run are fused).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from torch import fx

from fxfusion.errors import PassError, Refusal, RefusalCode, Refused
from fxfusion.passes.check_group import GroupChecker
from fxfusion.passes.ffn import Chain, FfnNode, Group, NamedWindows, Window, refusal_of
from fxfusion.passes.member_index import MemberIndex
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import FusionPolicy, NormMode

Planned = tuple[tuple[Group, ...], tuple[Refusal, ...]]

_HOIST_WOULD = "where only attention lies between them, mixers: hoist (FusionPlan(..., hoist=True)) would move it"


NO_WINDOWS = NamedWindows()


def plan_by_policy(
    chains: Sequence[Chain],
    ffns: Sequence[FfnNode],
    policy: FusionPolicy,
    checker: GroupChecker,
    named: NamedWindows = NO_WINDOWS,
) -> Planned:
    """Groups of every chain under the policy: its windows, and what the rules make of all other FFNs."""
    groups = [_window_group(window, ffns, checker, policy.norm) for window in named.windows]
    refusals = list(named.refusals.values())
    taken = {ffn.add for group in groups for ffn in group.members}
    for chain in (part for whole in chains for part in _around(whole, taken)):
        members, left_out = _eligible(chain, policy)
        refusals += left_out
        for run, reason in _compatible_runs(members, policy, checker):
            if len(run) >= policy.min_members:
                groups.append(checker.make_group(run, policy.norm))
            elif len(run) > 1 or reason is None:
                words = f"{len(run)} of this chain's FFNs fit together, min_members is {policy.min_members}"
                why = reason or Refused(RefusalCode.POLICY, words)
                refusals += [refusal_of(ffn, why.code, why.message) for ffn in run]
            else:
                refusals += [refusal_of(ffn, reason.code, reason.message) for ffn in run]
    return tuple(groups), tuple(refusals)


def _around(chain: Chain, taken: Container[fx.Node]) -> Iterator[Chain]:
    """The parts of a chain beside the windows in it."""
    for is_taken, run in groupby(chain.members, key=lambda ffn: ffn.add in taken):
        members = tuple(run)
        if not is_taken:
            yield replace(chain, members=members, leading=chain.leading and members[0] is chain.members[0])


def _window_group(window: Window, ffns: Sequence[FfnNode], checker: GroupChecker, norm: NormMode) -> Group:
    """The group of a window's members, as they are matched now."""
    by_add = {ffn.add: ffn for ffn in ffns}
    gone = [member.name for member in window.members if member.add not in by_add]
    if gone:
        raise PassError(f"{gone[0]} is no FFN any more after the mixers of window {list(window.names)} moved")
    members = [by_add[member.add] for member in window.members]
    checker.check_fit(members, norm)
    return replace(checker.make_group(members, norm), window=window)


def _eligible(chain: Chain, policy: FusionPolicy) -> tuple[list[FfnNode], list[Refusal]]:
    """The members that the policy lets in, and refusals for the others."""
    members, refusals = list(chain.members), []
    if chain.leading and not policy.include_leading:
        words = "the first FFN after a mixer, in the mixer's own layer; include_leading is False"
        refusals.append(refusal_of(members.pop(0), RefusalCode.POLICY, words))
    for _ in range(min(policy.keep_last, len(members))):
        words = f"among the last {policy.keep_last} of its chain; keep_last is {policy.keep_last}"
        refusals.append(refusal_of(members.pop(), RefusalCode.POLICY, words))
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
    named: NamedWindows = NO_WINDOWS,
) -> Planned:
    """Exactly the plan's groups; a group that cannot be had is refused, with the member at fault."""
    if not ffns:
        return (), tuple(named.refusals.values())
    index = MemberIndex(ffns, refused)
    groups: list[Group] = []
    refusals: list[Refusal] = []
    for number, names in enumerate(plan.groups):
        window = named.window(names)
        if names in named.refusals:
            refusals.append(named.refusals[names])
        elif window is not None:
            groups.append(_window_group(window, ffns, checker, plan.norm))
        elif not index.holds_any(names):
            refusals.append(Refusal(code=RefusalCode.PLAN_ABSENT, message=index.absent(f"group {number}", names)))
        else:
            try:
                members = _neighbours(names, chains, index)
                checker.check_fit(members, plan.norm)
                groups.append(checker.make_group(members, plan.norm))
            except Refused as error:
                message = f"group {number} {list(names)}: {error.message}"
                refusals.append(Refusal(code=RefusalCode.PLAN_UNMATCHED, message=message))
    chosen = {ffn.add for group in groups for ffn in group.members}
    left = (ffn for chain in chains for ffn in chain.members if ffn.add not in chosen)
    refusals += [refusal_of(ffn, RefusalCode.NOT_IN_PLAN, "no group of the plan names it") for ffn in left]
    return tuple(groups), tuple(refusals)


def _neighbours(names: Sequence[Member], chains: Sequence[Chain], index: MemberIndex) -> list[FfnNode]:
    """The named FFNs in graph order. Raises `Refused` unless they are neighbours in one chain."""
    place = {ffn.add: (c, m) for c, chain in enumerate(chains) for m, ffn in enumerate(chain.members)}
    members = [index.one(name) for name in names]
    for name, ffn in zip(names, members, strict=True):
        if ffn.add not in place:
            words = f"{name!r} is in no chain{index.why(name)}; {_HOIST_WOULD}"
            raise Refused(RefusalCode.PLAN_UNMATCHED, words)
    ordered = sorted(members, key=lambda ffn: place[ffn.add])
    spots = [place[ffn.add] for ffn in ordered]
    for one, other in zip(spots, spots[1:], strict=False):
        if (one[0], one[1] + 1) != other:
            words = f"its members are not neighbours in one chain; {_HOIST_WOULD}"
            raise Refused(RefusalCode.PLAN_UNMATCHED, words)
    return ordered
