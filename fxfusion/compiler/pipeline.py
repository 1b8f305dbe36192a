"""The data flow, readable top to bottom.

    capture -> normalise -> match -> group into chains -> plan -> rewrite -> verify -> compile
                                 └─ hoist the windows that a policy or plan names, match again ─┘

`fuse_captured` takes one captured graph through normalise .. verify; `explain` and `fuse_graph` are
its public faces, `backend.ffn_fusion` compiles what it returns. Matching never edits, rewriting never
searches, and the caller's graph is never touched: all edits are made on a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxfusion.compiler.capture import CapturedGraph, capture_model, captured_from_graph
from fxfusion.compiler.observe import Reads
from fxfusion.compiler.options import Choice, VerifyMode, choose
from fxfusion.compiler.pack_values import own, packed_values
from fxfusion.compiler.summary import blocks_after, blocks_before, summarise_chain, summarise_group
from fxfusion.compiler.unwrap import unwrapped
from fxfusion.compiler.verify import Form, Part, Proof, prove_rewrite
from fxfusion.errors import OptionError, Refusal, RefusalCode
from fxfusion.graph import debug
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import forget_effects
from fxfusion.graph.inline import drop_unused_state
from fxfusion.graph.pass_base import History, Pass
from fxfusion.graph.pass_manager import run_passes
from fxfusion.passes.check_group import GroupChecker
from fxfusion.passes.choose_form import Target, choose_forms
from fxfusion.passes.concat_parallel_mixers import ConcatParallelMixers
from fxfusion.passes.concatenate import Concatenate
from fxfusion.passes.drop_no_ops import DropNoOps
from fxfusion.passes.drop_zero_branches import DropZeroBranches
from fxfusion.passes.ffn import Chain, FfnNode, Group, Matches, Mixer, NamedWindows
from fxfusion.passes.find_chains import find_chains
from fxfusion.passes.functionalise_adds import FunctionaliseAdds
from fxfusion.passes.hoist_constants import HoistConstants
from fxfusion.passes.hoist_mixers import HoistMixers
from fxfusion.passes.lift_weights import Into, LiftWeights, Pack
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.match_window import WindowMatcher
from fxfusion.passes.parallelise import Parallelise
from fxfusion.passes.parallelise_mixers import ParalleliseMixers
from fxfusion.passes.plan_groups import plan_by_plan, plan_by_policy
from fxfusion.passes.read_sizes_early import ReadSizesEarly
from fxfusion.passes.specialise_numbers import SpecialiseNumbers
from fxfusion.passes.write_out import WriteOut
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import FusionPolicy
from fxfusion.report import FusionReport, GraphReport

_BY_NUMBERS = frozenset(
    {RefusalCode.STRUCTURE, RefusalCode.RANDOM, RefusalCode.SCALED_STREAM, RefusalCode.NOT_POINTWISE}
)
"""Refusals of branches that another number may lift: a scale that was 0, a dropout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphAnalysis:
    """What was found in one graph and chosen from it; references into the graph it was made from."""

    matches: Matches
    chains: tuple[Chain, ...]
    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    named: NamedWindows
    wide_mixers: tuple[tuple[Mixer, ...], ...] = ()  # mixers that were made to read one stream, by window

    @property
    def depends_on_numbers(self) -> bool:
        """Whether there are two FFNs, or what other numbers in the graph could make two FFNs."""
        adds = {ffn.add.name for ffn in self.matches.ffns}
        adds |= {refusal.node for refusal in self.matches.refusals if refusal.code in _BY_NUMBERS}
        return len(adds) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedGraph:
    """One graph after the rewrite. `packs` say how the packed weights that it reads are computed. `notes`: what its
    proof did not see. `parallel`: its parallel form, where something fused and is proved in numbers."""

    module: fx.GraphModule
    packs: tuple[Pack, ...]
    report: GraphReport
    notes: tuple[str, ...] = ()
    parallel: Form | None = None


def fuse_captured(
    captured: CapturedGraph,
    choice: Choice,
    *,
    verify: VerifyMode = "structure",
    lift_into: Into | None = "placeholder",
    compiled_for: Target | None = None,
) -> FusedGraph:
    """Normalise, match, group, plan, rewrite and verify one captured graph.

    `compiled_for`: each group gets the form that is fastest there. Without it the graph stays portable
    ("concatenated") and the report says which form the backend would choose for inference.
    `lift_into`: None leaves the computation of wide weights in the graph, where their gradients are native.
    """
    work = captured.copy()
    history = History(check=verify != "off")
    numbers = SpecialiseNumbers()
    run_passes(work.module, (numbers, *normalising_passes(work.weights)), history)
    cleaned = work.copy().module if verify in ("numeric", "paranoid") else None
    order = {node.name: place for place, node in enumerate(work.module.graph.nodes)}  # before anything moves
    found = with_forms(hoist_and_analyse(work, choice, history), choice, compiled_for or Target())
    blocks = blocks_before(found.matches, found.groups, order)
    groups = tuple(map(summarise_group, found.groups))
    after, fused_blocks = captured.module, blocks
    made = _Rewritten()
    if found.groups:
        made = _rewrite(captured, cleaned, work, found if compiled_for else _portable(found), history, lift_into)
        after, fused_blocks = work.module, blocks_after(blocks, groups)
    forget_effects(work.module.graph)
    if found.depends_on_numbers:
        numbers.guard()
    _log(found)
    report = GraphReport(
        chains=tuple(map(summarise_chain, found.chains)),
        groups=groups,
        refusals=(*found.refusals, *history.refusals),
        history=tuple(record.to_dict() for record in history.records),
        verifications=tuple(row.to_dict() for row in made.proof.rows),
        blocks_before=blocks,
        blocks_after=fused_blocks,
        before=captured.module,
        after=after,
        nodes_before=len(captured.module.graph.nodes),
        nodes_after=len(after.graph.nodes),
    )
    return FusedGraph(module=after, packs=made.packs, report=report, notes=made.proof.notes, parallel=made.parallel)


def normalising_passes(weights: frozenset[str]) -> tuple[Pass, ...]:
    """Exact clean-up, in order. `weights`: names of the placeholders that hold module state."""
    return (
        DropNoOps(),  # first: casts and views hide the stream from everything that follows
        WriteOut(),  # before sizes are read: that of a sum is known, that of a layer in one operation is not
        FunctionaliseAdds(),  # before zero branches: `branch += 0` is an addition too
        ReadSizesEarly(),  # behind it: what is written in place keeps its sizes to itself
        DropZeroBranches(weights),
        DropNoOps(),  # a dropped zero branch can leave views that now cancel
        HoistConstants(weights),  # last: only what is left needs to be in reach
    )


def hoist_and_analyse(captured: CapturedGraph, choice: Choice, history: History) -> GraphAnalysis:
    """Hoist the windows that the choice names, in the graph, then match again, group and plan."""
    found = analyse(captured, choice)
    windows = found.named.windows
    if not windows:
        return found
    wide_mixers = ParalleliseMixers(windows, found.matches)
    run_passes(captured.module, [HoistMixers(windows), wide_mixers], history)
    return replace(
        analyse(captured, choice, found.named), wide_mixers=tuple(tuple(block) for block in wide_mixers.blocks)
    )


def analyse(captured: CapturedGraph, choice: Choice, named: NamedWindows | None = None) -> GraphAnalysis:
    """Match, group and plan. Edits nothing.

    Before its mixers moved, the FFNs of a window are already a group, but in no chain.

    `named`: what became of the windows that the choice names; None: nothing was moved, see which could be.
    """
    facts = GraphFacts(captured.module.graph, captured.weights)
    matches = match_residual(facts, captured.opaque)
    if named is None:
        named = WindowMatcher(matches, facts, choice.norm).match(choice.windows) if choice.windows else NamedWindows()
    chains, alone = find_chains(matches, facts)
    checker = GroupChecker(facts, matches.ffns)
    if isinstance(choice, FusionPlan):
        refused = (*matches.refusals, *alone)
        groups, left = plan_by_plan(chains, matches.ffns, refused, choice, checker, named)
    else:
        groups, left = plan_by_policy(chains, matches.ffns, choice, checker, named)
    refusals = (*matches.refusals, *alone, *left)
    return GraphAnalysis(matches=matches, chains=chains, groups=groups, refusals=refusals, named=named)


def with_forms(found: GraphAnalysis, choice: Choice, target: Target) -> GraphAnalysis:
    """The same with a form for each group; what a policy with `profitable_only` leaves alone becomes a refusal."""
    profitable_only = isinstance(choice, FusionPolicy) and choice.profitable_only
    groups, left = choose_forms(found.groups, target, profitable_only)
    return replace(found, groups=groups, refusals=(*found.refusals, *left))


def _portable(found: GraphAnalysis) -> GraphAnalysis:
    """The same with wide weights of the plain kind, which any compiler and device takes."""
    return replace(found, groups=tuple(replace(group, form="concatenated") for group in found.groups))


@dataclass(frozen=True, slots=True)
class _Rewritten:
    packs: tuple[Pack, ...] = ()
    parallel: Form | None = None
    proof: Proof = Proof()


def _rewrite(
    captured: CapturedGraph,
    cleaned: fx.GraphModule | None,
    work: CapturedGraph,
    found: GraphAnalysis,
    history: History,
    lift_into: Into | None,
) -> _Rewritten:
    """Let the members of each group read one stream, join them and the mixers of wide windows, lift their weights, and
    prove that all but the first is exact.

    `cleaned`: the graph before any group was touched; None where nothing is to be proved.
    """
    groups = found.groups
    parallel = Form(work.copy().module, _parallel_reads(groups)) if cleaned is not None else None
    lift = LiftWeights(work.weights, lift_into)
    steps = (
        Parallelise(groups),
        Concatenate(groups),
        ConcatParallelMixers(found.wide_mixers, work.weights, work.opaque, len(groups)),
        lift,
    )
    run_passes(work.module, steps, history)
    if cleaned is None or parallel is None:
        return _Rewritten(lift.packs)
    proof = prove_rewrite(captured, cleaned, parallel, work.module, lift.packs, _parts(found))
    return _Rewritten(lift.packs, parallel, proof)


def _parallel_reads(groups: Sequence[Group]) -> Reads:
    """What the members of each group read in the parallel form: its stream, with norm="last" through the last norm."""
    reads: dict[str, dict[str, str]] = {}
    for group in groups:
        stream, last = group.members[0].stream, group.members[-1]
        normed = last.normed if last.prologue else stream
        for member, node in ((each, node) for each in group.members for node in each.nodes):
            own = reads.setdefault(node.name, {})
            own[member.stream.name] = stream.name
            if group.norm == "last" and node not in member.prologue:
                own[(member.normed if member.prologue else member.stream).name] = normed.name
    return reads


def _parts(found: GraphAnalysis) -> tuple[Part, ...]:
    """What of the parallel form one node may stand for: groups, and blocks of mixers that read one stream."""

    def part(label: str, run: Sequence[FfnNode | Mixer], group: int | None = None) -> Part:
        nodes = frozenset(node.name for each in run for node in (*each.nodes, each.add))
        return Part(label=label, end=run[-1].add.name, nodes=nodes, group=group)

    groups = (part(f"group {index}", group.members, index) for index, group in enumerate(found.groups))
    blocks = (part(f"mixers {index}", block) for index, block in enumerate(found.wide_mixers))
    return (*groups, *blocks)


def _log(found: GraphAnalysis) -> None:
    fused = sum(len(group.members) for group in found.groups)
    debug.show(1, f"{len(found.matches.ffns)} FFNs, {len(found.chains)} chains, {fused} fused into {len(found.groups)}")
    for refusal in found.refusals:
        debug.show(2, f"not fused: {refusal.layer or refusal.node}: {refusal.code.value}: {refusal.message}")


def explain(
    model: torch.nn.Module | Callable[..., Any],
    *args: Any,
    policy: str | Mapping[str, object] | FusionPolicy | None = None,
    plan: Any = None,
    **kwargs: Any,
) -> FusionReport:
    """What would be found and fused in `model(*args, **kwargs)`. Touches no weight, computes nothing.

    Works on models on the meta device; of what `torch.compile` or PEFT wrapped, names are those of the model inside.
    Several graphs (graph breaks) are reported one by one. Raises
    `CaptureError` where the model cannot be captured, `OptionError` or `PlanError` for a bad choice.
    """
    choice = choose(policy, plan)
    captured, notes = capture_model(unwrapped(model), args, kwargs)
    reports = [fuse_captured(graph, choice).report for graph in captured]
    return FusionReport(graphs=tuple(reports), notes=notes)


def fuse_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    policy: str | Mapping[str, object] | FusionPolicy | None = None,
    plan: Any = None,
    *,
    verify: VerifyMode = "structure",
) -> tuple[fx.GraphModule, FusionReport]:
    """A fused copy of a graph module (from `symbolic_trace`, `torch.export` or Dynamo), and the report.

    Weights that are attributes of `gm` are packed into new parameters of the copy; weights that are
    inputs (Dynamo) stay inputs, and are concatenated in the graph. `gm` is not changed.
    """
    if verify == "paranoid":
        raise OptionError(
            "verify: 'paranoid' looks at calls, and fuse_graph returns a graph; give it 'numeric', or give "
            "'paranoid' to the backend ffn_fusion"
        )
    choice = choose(policy, plan)
    captured = captured_from_graph(gm, example_inputs)
    portable = Target(request="concatenated")
    fused = fuse_captured(captured, choice, verify=verify, lift_into="get_attr", compiled_for=portable)
    if fused.packs:
        _register_packs(fused, captured.values)
    report = FusionReport(graphs=(fused.report,), notes=fused.notes)
    return fused.module, report


def _register_packs(fused: FusedGraph, values: Mapping[str, torch.Tensor]) -> None:
    """Compute the packed weights as parameters of the module, group by group, and drop what nobody reads."""
    module = fused.module
    for pack in fused.packs:
        sources = [values[name] for name in pack.sources]
        trainable = any(source.requires_grad for source in sources)
        with torch.no_grad():
            for name, value in zip(pack.values, packed_values(pack.module, sources), strict=True):
                delattr(module, name)
                module.register_parameter(name, torch.nn.Parameter(own(value, sources), requires_grad=trainable))
    drop_unused_state(module)
    module.recompile()
