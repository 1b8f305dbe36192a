"""From measurements to a plan: which attention to drop, which FFNs to fuse, under a budget.

    plan = make_plan(model, batches, drop=0.4, max_perplexity_increase=0.05)
    torch.compile(drop_attention(model, plan.dropped_attention), backend=ffn_fusion, options={"plan": plan})

Scores propose which attention to drop, the dependency matrix proposes how to group, and every proposal is then
measured on the same batches by graph (`PlanMeter`): what is chosen is the best that was measured.
Source: arXiv 2503.18908, sections 3 and 4, where both choices were made by eye.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.scores import AttentionScores, Method, attention_scores
from fxfusion.errors import PlanError
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Budget, Limits, Measured
from fxfusion.planning.candidates import DroppedModel, candidates, equal_cuts, shallowest

# An end of a chain stays out where fusing it costs more than so many times what the other merges cost on average, and
# at least so many nats per token: below 1 % of the perplexity, one FFN less is worth more.
_UNFAIR, _NOTICED = 2.0, 0.01
_ANYTHING = Budget()


@dataclass(slots=True)
class Planner:
    """Proposes and measures plans for one model on the same batches.

    `norm`: None measures both modes. `method`: of `attention_scores`.
    """

    meter: PlanMeter
    limits: Limits = field(default_factory=Limits)
    norm: NormMode | None = None
    method: Method = "loss"
    cache: str | os.PathLike[str] | None = None
    progress: bool = False
    _scores: AttentionScores | None = None
    _order: tuple[int, ...] = ()
    _dropped: dict[tuple[int, ...], DroppedModel] = field(default_factory=dict)

    @property
    def scores(self) -> AttentionScores:
        """What each attention is worth while all others are there."""
        if self._scores is None:
            self._scores = self._score(greedy=False)
        return self._scores

    @property
    def known_scores(self) -> AttentionScores | None:
        """The scores, if they were needed so far."""
        return self._scores

    @property
    def order(self) -> tuple[int, ...]:
        """All attentions in the order in which greedy dropping takes them."""
        return self.first(len(self.meter.mixers))

    def first(self, number: int) -> tuple[int, ...]:
        """The attentions that greedy dropping takes first. Each one more costs a score of all that are left."""
        if len(self._order) < number:  # without a cache measured anew: then twice as many, so as not to come here often
            wanted = min(max(number, 2 * len(self._order)), len(self.meter.mixers))
            self._scores = self._score(greedy=True, drop=wanted)
            self._order = tuple(self._scores.order)
        return self._order[:number]

    def _score(self, greedy: bool, drop: int | None = None) -> AttentionScores:
        path = None if self.cache is None else os.path.join(self.cache, "scores.json")
        return attention_scores(
            self.meter.model,
            self.meter.batches,
            self.method,
            greedy=greedy,
            drop=drop,
            cache=path,
            progress=self.progress,
        )

    def drops(self, number: int) -> tuple[tuple[int, ...], ...]:
        """Which attentions to drop: greedily, the cheapest by score, and the cheapest run of neighbours."""
        if number == 0:
            return ((),)
        mixers = self.meter.mixers
        greedy = self.first(number)  # this scores them too
        value = {layer: float(self.scores[layer]) for layer in mixers}
        runs = [mixers[start : start + number] for start in range(len(mixers) - number + 1)]
        run = min(runs, key=lambda layers: sum(value[layer] for layer in layers))
        found = (greedy, sorted(mixers, key=value.__getitem__)[:number], run)
        return tuple(dict.fromkeys(tuple(sorted(layers)) for layers in found))

    def without(self, dropped: Sequence[int]) -> DroppedModel:
        """The model without some attention: chains and the dependencies inside them."""
        key = tuple(sorted(dropped))
        if key not in self._dropped:
            chains = self.meter.chains(key)
            matrices: list[torch.Tensor] = []
            if chains:
                folder = None if self.cache is None else os.path.join(self.cache, "matrix_" + "_".join(map(str, key)))
                matrix = dependency_matrix(
                    self.meter.model,
                    self.meter.batches,
                    unit="ffn",
                    dropped_attention=key,
                    resume=folder,
                    progress=self.progress,
                )
                place: dict[Member, int] = {name: index for index, name in enumerate(matrix.names)}
                place |= {layer: index for index, layer in enumerate(matrix.layers)}
                rows = [[place[member] for member in chain.members] for chain in chains]
                matrices = [matrix.values[row][:, row] for row in rows]
            self._dropped[key] = DroppedModel(key, chains, tuple(matrices), self.meter.ffns)
        return self._dropped[key]

    def measure(self, model: DroppedModel, groups: Sequence[Sequence[Any]], norm: NormMode | None = None) -> Measured:
        plan = model.plan(groups, norm or self.norm or "fold")
        return Measured(plan, model.depth(groups), model.bytes_of(groups), self.meter.quality(plan))

    def best_at(self, dropped: Sequence[int], depth: int, budget: Budget = _ANYTHING) -> Measured | None:
        """The best of all proposals within the budget's quality that leave `depth` FFNs; None if there is none.

        The plainest one is kept unless the best is measured better, beyond what chance gives the best of so many. It
        is the paper's rule where that reaches the depth: even cuts without the ends of a chain, the last member's norm
        (where the norm is free), which is kept in the same way.
        """
        model = self.without(dropped)
        tried = (self.measure(model, groups) for groups in candidates(model, self.limits, depth))
        found = [one for one in tried if budget.allows(one.quality)]
        if not found:
            return None
        by_eye = found[0].plan.groups == equal_cuts(model, depth, 1, 1)
        plainest = self._with_better_norm(model, found[0], "last" if by_eye else "fold", budget)
        best = min(found, key=_cost)
        if best is found[0] or not self._is_better(best, plainest, choices=len(found) - 1):
            return plainest
        return self._with_better_norm(model, best, "fold", budget)

    def _with_better_norm(self, model: DroppedModel, fold: Measured, kept: NormMode, budget: Budget) -> Measured:
        """The same groups with the norm mode to be kept, or with the other one where that is measured better."""
        if self.norm is not None or not fold.plan.groups:
            return fold
        last = self.measure(model, fold.plan.groups, "last")
        if not budget.allows(last.quality):
            return fold
        one, other = (fold, last) if kept == "fold" else (last, fold)
        return other if self._is_better(other, one) else one

    def _is_better(self, one: Measured, than: Measured, choices: int = 1) -> bool:
        return one.cost < than.cost and self.meter.difference(one.plan, than.plan).below_zero(choices)

    def depths(self, dropped: Sequence[int]) -> range:
        """The numbers of FFNs that can be had, from the fewest to all."""
        model = self.without(dropped)
        return range(shallowest(model, self.limits), model.ffns + 1)

    def unfused(self, dropped: Sequence[int]) -> Quality:
        """What dropping some attention costs before anything is fused."""
        return self.meter.quality(FusionPlan(dropped_attention=tuple(sorted(dropped))))

    def fused(self, dropped: Sequence[int]) -> Measured:
        """As few FFNs as the limits allow."""
        found = self.best_at(dropped, self.depths(dropped)[0])
        assert found is not None, "the shallowest partition is itself a candidate"
        return found

    def best_of(self, dropped: Sequence[int], budget: Budget, below: int | None = None) -> Measured | None:
        """The plan with the fewest FFNs (fewer than `below`) within the budget's quality; None if there is none."""
        if not budget.allows(self.unfused(dropped)):
            return None  # fusing costs on top of dropping
        for depth in self.depths(dropped):
            found = self.best_at(dropped, depth, budget) if below is None or depth < below else None
            if found is not None:
                return found
        return None

    def without_costly_ends(self, full: Measured) -> Measured:
        """Leave out the last or leading FFN of a chain where measurement says that it costs more than its share."""
        model = self.without(full.plan.dropped_attention)
        unfused = self.measure(model, ())
        best = full
        ends = [(chain.members[-1], chain.members[0] if chain.leading else None) for chain in model.chains]
        for member in (member for pair in ends for member in pair if member is not None):
            groups = [tuple(other for other in group if other != member) for group in best.plan.groups]
            smaller = self.measure(model, [group for group in groups if len(group) > 1], best.plan.norm)
            others = unfused.depth - smaller.depth  # merges that remain
            if smaller.depth == best.depth or others == 0:
                continue
            share = max(smaller.cost - unfused.cost, 0.0) / others
            if best.cost - smaller.cost > max(_UNFAIR * share, _NOTICED):
                best = smaller
        return best


def _cost(measured: Measured) -> float:
    return measured.cost


def search(planner: Planner, budget: Budget, dropped: Sequence[int] | None = None) -> Measured:
    """The best plan within the budget. Raises `PlanError` that says what is possible where there is none."""
    sets = _proposals(planner, budget, dropped)
    if budget.target_depth is not None:
        at_depth = [planner.best_at(layers, budget.target_depth, budget) for layers in sets]
        best = min((measured for measured in at_depth if measured is not None), key=_cost, default=None)
    elif budget.limits_quality:
        best = _fewest(planner, budget, sets)
    else:
        fused = min((planner.fused(layers) for layers in sets), key=_cost)
        best = planner.without_costly_ends(fused)
    if best is None:
        raise PlanError(_why_none(planner, sets))
    return best


def _proposals(planner: Planner, budget: Budget, dropped: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Sets of attentions to drop, the largest first."""
    mixers = len(planner.meter.mixers)
    number = budget.count(mixers)
    if dropped is not None:
        return [tuple(sorted(dropped))]
    if number is not None:
        return list(planner.drops(number))
    if budget.target_depth is not None:
        return list(planner.drops(min(mixers, max(0, planner.meter.ffns - budget.target_depth))))
    if not budget.limits_quality:
        return [()]
    found: list[tuple[int, ...]] = []
    for count in range(mixers + 1):
        allowed = [layers for layers in planner.drops(count) if budget.allows(planner.unfused(layers))]
        if not allowed:
            break  # dropping more costs more
        found = [*allowed, *found]
    return found


def _fewest(planner: Planner, budget: Budget, sets: Sequence[tuple[int, ...]]) -> Measured | None:
    """The plan with the fewest FFNs over all sets; each attention that is kept keeps an FFN from its neighbour."""
    best: Measured | None = None
    kept = len(planner.meter.mixers)
    for layers in sets:
        if best is not None and kept - len(layers) > best.depth:
            continue
        found = planner.best_of(layers, budget, None if best is None else best.depth + 1)
        rivals = [measured for measured in (found, best) if measured is not None]
        best = min(rivals, key=lambda measured: (measured.depth, measured.cost), default=None)
    return best


def _why_none(planner: Planner, sets: Sequence[tuple[int, ...]]) -> str:
    """What can be had instead."""
    lines = []
    for layers in sets:
        depths, increase = planner.depths(layers), planner.unfused(layers).loss_increase
        assert increase is not None
        lines.append(
            f"without the attention of {list(layers)}: {depths[0]} to {depths[-1]} FFNs, and {float(increase):+.3f} "
            "nats before anything is fused"
        )
    return "no plan fits the budget; " + ("; ".join(lines) or "the intact model itself is outside it")
