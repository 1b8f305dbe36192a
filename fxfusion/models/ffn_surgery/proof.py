"""What a fused model must compute: the parallel form of the groups, taken from the graph before anything was changed.

The parallel form is run operation by operation on the members' own weights, so it owes nothing to how the wide
weights are made: once as the model computes, and once in wider numbers, each weight widened when it is used. The
fused model may be off the wider run by twice what the parallel form itself is, in float32 by 1e-5 in any case: one
rounding error that happens to be small is no bound for another. On the meta device nothing can be computed; there the
changed model is captured anew, and its FFNs must be as many and as wide as the recipe says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfusion.compiler.pipeline import analyse, hoist_and_analyse
from fxfusion.errors import Refused, SurgeryError
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import effect_of
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.quantised import plain
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.surgery_proof import full_logits, relative
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.passes.match_heads import match_heads
from fxfusion.passes.match_mixer import match_mixer
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.parallelise import Parallelise
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import FusionPolicy

_TIMES = 2.0  # what the parallel form itself is off, and as much again
_FLOOR = 2  # times the epsilon of a half-precision dtype, where the parallel form happens to be off by less
# What the contract allows a float32 model, whatever the parallel form is off by chance; and what float64 models are off
# that compute their norms in float32.
_FLOORS = {torch.float32: 1e-5, torch.float64: 1e-6}


@dataclass(frozen=True, slots=True)
class ParallelForm:
    """`exact`: logits `[2, tokens, vocabulary]` with none, the first one, two, ... groups in parallel, in wider
    numbers; `errors`: what they are off in the model's own."""

    ids: Tensor
    exact: tuple[Tensor, ...]
    errors: tuple[float, ...]

    @classmethod
    def of(cls, traced: TracedGraph, plan: FusionPlan, ids: Tensor) -> ParallelForm:
        """Run the graph twice for each group, and before where layers go whole."""
        exact, errors = [torch.empty(0)] * (not plan.removed), [0.0] * (not plan.removed)
        for end in range(len(exact), len(plan.groups) + 1):
            own, wider = _parallel_logits(traced, plan.replace(groups=plan.groups[:end], model=None), ids)
            exact.append(wider)
            errors.append(relative(own, wider))
        return cls(ids, tuple(exact), tuple(errors))

    def check(self, model: nn.Module, groups: int) -> float:
        """The relative error of the logits with so many groups fused. Raises `SurgeryError` where it is no rounding."""
        found = full_logits(model, self.ids)
        error = relative(found, self.exact[groups])
        floor = _FLOORS.get(found.dtype, _FLOOR * torch.finfo(found.dtype).eps)
        limit = max(_TIMES * self.errors[groups], floor)
        if not error <= limit:
            raise SurgeryError(f"the fused model's logits are off by {error:.2g} (allowed {limit:.2g})")
        return error


@torch.no_grad()
def _parallel_logits(traced: TracedGraph, plan: FusionPlan, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits as the model computes, and in wider numbers."""
    work = traced.captured.copy()
    by_name = {node.name: node for node in work.module.graph.nodes}
    work.module.graph.output_node().args = (by_name[traced.logits.name],)
    groups = hoist_and_analyse(work, plan, History()).groups
    run_passes(work.module, [Parallelise(groups)], History())
    own: Tensor = fx.Interpreter(work.module).run(*traced.inputs(ids).values())
    wider: Tensor = _Wider(work.module).run(*traced.inputs(ids).values())
    return own.detach().clone(), wider.detach().clone()


class _Wider(fx.Interpreter):
    """Computes in float32 what a half-precision model computes, in float64 everything else."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        values = [ops.tensor_value(node) for node in module.graph.nodes if node.op == "placeholder"]
        kinds = [value.dtype for value in values if value is not None and value.is_floating_point()]
        is_half = any(kind.itemsize < 4 for kind in kinds)
        self._wide = torch.float32 if is_half else torch.float64

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if effect_of(n).switches:
            return args, kwargs
        return fx.node.map_aggregate(args, self._widened), fx.node.map_aggregate(kwargs, self._widened)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return plain(value).to(self._wide)
        return self._wide if isinstance(value, torch.dtype) and value.is_floating_point else value


def check_widths(model: nn.Module, before: TracedGraph, recipe: FuseRecipe, ids: Tensor) -> None:
    """Raises `SurgeryError` unless the model's FFNs, captured anew, are those that the recipe leaves."""
    widths = _widths(before)
    for group in recipe.groups:
        if group.is_window:
            for layer in group.layers:
                widths.pop(layer)
        widths[group.home.layer] = [group.width]
    wanted = [widths.get(layer, []) for layer in recipe.kept]
    after = TracedModel(model).graph(ids)
    found = _widths(after)
    if [found.get(layer, []) for layer in range(len(recipe.kept))] != wanted:
        raise SurgeryError(f"the changed model has FFNs of widths {found}, where {wanted} were expected")
    joined = sum(len(attention.members) - 1 for attention in recipe.attentions.values())
    mixers = len(before.blocks.mixers) - joined
    if len(after.blocks.mixers) != mixers:
        raise SurgeryError(f"the changed model has {len(after.blocks.mixers)} attentions instead of {mixers}")


def check_heads(model: nn.Module, recipe: FuseRecipe, groups: Sequence[GroupRecipe], ids: Tensor) -> None:
    """Raises `SurgeryError` unless the attentions of wide windows, captured anew, have the heads that they should.

    `groups`: those that are fused by now. Computes nothing, so it works on the meta device.
    """
    gone = {*recipe.gone, *(layer for group in groups for layer in group.removed)}
    kept = [layer for layer in range(recipe.count) if layer not in gone]
    traced = TracedModel(model).graph(ids)
    facts = GraphFacts(traced.captured.module.graph, traced.captured.weights)
    mixers = {mixer.add: mixer for mixer in match_residual(facts, {}).mixers}
    for attention in (part for group in groups for part in recipe.parts_of(group)[1:]):
        (block,) = traced.blocks.mixers_of([kept.index(attention.home.layer)])
        try:
            mixer = mixers[block.after]
            heads = match_heads(match_mixer(mixer, mixer.stream, facts, {}, loose=True), facts)
        except Refused as refused:
            raise SurgeryError(f"{attention.home.name} after it was widened: {refused.message}") from None
        found = [(piece.projection, piece.start, piece.stop) for piece in heads.pieces]
        wanted = [
            (cut.projection, channels.start, channels.stop)
            for cut in attention.home.cuts
            for channels in [cut.widened(attention.home.width, attention.width)]
        ]
        counts, times = (*heads.counts, heads.out_count), len(attention.members)
        if found != wanted or counts != tuple(count * times for count in attention.heads):
            raise SurgeryError(
                f"{attention.home.name} would read heads {counts} of channels {found}, where {times} times "
                f"{attention.heads} of {wanted} were expected"
            )


def _widths(traced: TracedGraph) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    layer_of = {block.after: block.layer for block in traced.blocks.ffns}
    for ffn in analyse(traced.captured, FusionPolicy()).matches.ffns:
        if ffn.add in layer_of:
            found.setdefault(layer_of[ffn.add], []).append(ffn.width)
    return found
