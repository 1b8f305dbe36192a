"""A model as it would be under a plan, by graph alone: attention removed, groups fused. The model stays as it is.

Before:  the captured graph of the intact model
After:   without the mixers of `plan.dropped_attention` and all of `plan.removed`, each of `plan.groups` one wide FFN

Used to measure many plans quickly: no surgery, no compiler, one capture for all plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxfusion.compiler.capture import CapturedGraph
from fxfusion.compiler.pipeline import GraphAnalysis, analyse, fuse_captured, normalising_passes
from fxfusion.errors import NotFusedError, OptionError, PlanError, RefusalCode
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import FusionPolicy
from fxfusion.report import GraphReport

_NOT_FUSED = (RefusalCode.PLAN_UNMATCHED, RefusalCode.PLAN_ABSENT)


class PlannedModel:
    """`planned(input_ids)` or `planned(**inputs)` gives the logits `[batch, seq, vocabulary]` under the plan.

    Weights are the model's own, but for the packed ones of the groups, which are computed here, once.
    Raises `PlanError` for what is not there to drop or remove, `NotFusedError` for a group that cannot be had.
    """

    def __init__(self, traced: TracedModel, plan: FusionPlan) -> None:
        self.traced = traced
        self.plan = plan
        self._programs: dict[int, _Program] = {}

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        batch = {"input_ids": input_ids, **inputs}
        graph = self.traced.graph(batch)
        with torch.no_grad():
            return self._program(graph).run(graph, batch)

    def program(self, graph: TracedGraph) -> tuple[fx.GraphModule, list[Tensor]]:
        """The fused graph for inputs of one shape, and the packed weights that it takes after them."""
        found = self._program(graph)
        return found.module, found.packed

    def _program(self, graph: TracedGraph) -> _Program:
        if id(graph) not in self._programs:
            shared = next(iter(self._programs.values()), None)
            self._programs[id(graph)] = _Program(graph, self.plan, shared)
        return self._programs[id(graph)]

    def report(self, input_ids: Tensor, **inputs: Any) -> GraphReport:
        """What was fused, for inputs like these."""
        self(input_ids, **inputs)
        return self._programs[id(self.traced.graph({"input_ids": input_ids, **inputs}))].report


class _Program:
    """The fused graph for one shape of inputs, with its packed weights."""

    def __init__(self, graph: TracedGraph, plan: FusionPlan, other: _Program | None) -> None:
        captured = without_parts(graph, plan.dropped_attention, plan.removed)
        fused = fuse_captured(captured, plan, verify="off")
        wrong = [refusal.message for refusal in fused.report.refusals if refusal.code in _NOT_FUSED]
        if wrong:
            raise NotFusedError(f"the plan does not fit this model: {'; '.join(wrong)}")
        self.report = fused.report
        self.module = fused.module
        if other is not None:  # the same plan on the same weights, only other shapes
            self.packed: list[Tensor] = other.packed
            return
        with torch.no_grad():
            self.packed = [
                value
                for pack in fused.packs
                for value in pack.module(*(captured.values[name] for name in pack.sources))
            ]

    def run(self, graph: TracedGraph, batch: dict[str, Any]) -> Tensor:
        logits: Tensor = self.module(*graph.inputs(batch).values(), *self.packed)
        return logits


def without_parts(graph: TracedGraph, layers: Iterable[int], removed: Iterable[int] = ()) -> CapturedGraph:
    """A copy of the captured graph that returns the logits alone, without the mixers of some layers, and without others
    as a whole."""
    try:
        blocks = graph.parts_of(layers, removed)
    except OptionError as error:
        raise PlanError(f"{error}") from None
    work = graph.captured.copy()
    by_name: dict[str, fx.Node] = {node.name: node for node in work.module.graph.nodes}
    work.module.graph.output_node().args = (by_name[graph.logits.name],)
    for block in blocks:
        by_name[block.after.name].replace_all_uses_with(by_name[block.before.name])
    erase_dead_code(work.module.graph)
    run_passes(work.module, normalising_passes(work.weights), History())  # views around a mixer may cancel now
    return work


def analyse_without(graph: TracedGraph, layers: Iterable[int]) -> GraphAnalysis:
    """FFNs and chains of the model without the mixers of some layers."""
    return analyse(without_parts(graph, layers), FusionPolicy())
