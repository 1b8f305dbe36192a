"""The search in chains: which attention to drop, and which FFNs of the chains that this leaves become one.

Scores say which attention to drop, the dependency matrix how to group what is left; the candidates of both
(`fxfusion.planning.partition`) are measured on the same batches by graph, and what is chosen is the best that was
measured. Source: arXiv 2503.18908, sections 3 and 4, where both choices were made by eye.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.meter import ChainFacts
from fxfusion.analysis.scores import AttentionScores, Method, attention_scores
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Budget, Limits, Measured
from fxfusion.planning.choice import ANYTHING, ROUNDING, Rung, Search, Start
from fxfusion.planning.partition import Chains
from fxfusion.report.progress import each

# An end of a chain stays out where fusing it costs more than so many times what the other merges cost on average, and
# at least so many nats per token: below 1 % of the perplexity, one FFN less is worth more.
_UNFAIR, _NOTICED = 2.0, 0.01
_MOST_DROPS = 6  # numbers of dropped attentions that a sweep tries by itself


@dataclass(slots=True, kw_only=True)
class ChainSearch(Search):
    """`norm`: None measures both modes. `method`: of `attention_scores`. `dropped`: exactly these attentions go;
    None: those that the budget and the scores say."""

    limits: Limits = field(default_factory=Limits)
    norm: NormMode | None = None
    method: Method = "loss"
    dropped: Start | None = None
    cache: str | os.PathLike[str] | None = None
    _scores: AttentionScores | None = None
    _order: Start = ()
    _chains: dict[Start, Chains] = field(default_factory=dict)

    @property
    def intact(self) -> Measured:
        return self.measure(FusionPlan(norm=self.norm or "fold"))

    # What to drop.

    @property
    def scores(self) -> AttentionScores:
        """What each attention is worth while all others are there."""
        if self._scores is None:
            self._scores = self._score(greedy=False)
        return self._scores

    @property
    def known_scores(self) -> AttentionScores | None:
        return self._scores

    def first(self, number: int) -> Start:
        """The attentions that greedy dropping takes first. Each one more costs a score of all that are left."""
        if len(self._order) < number:  # without a cache measured anew: then twice as many, so as not to come here often
            wanted = min(max(number, 2 * len(self._order)), len(self.judge.mixers))
            self._scores = self._score(greedy=True, drop=wanted)
            self._order = tuple(self._scores.order)
        return self._order[:number]

    def _score(self, greedy: bool, drop: int | None = None) -> AttentionScores:
        path = None if self.cache is None else os.path.join(self.cache, "scores.json")
        model, batches = self.judge.model, self.judge.batches
        return attention_scores(
            model, batches, self.method, greedy=greedy, drop=drop, cache=path, progress=self.progress
        )

    def drops(self, number: int) -> tuple[Start, ...]:
        """Which attentions to drop: greedily, the cheapest by score, and the cheapest run of neighbours."""
        if number == 0:
            return ((),)
        mixers = self.judge.mixers
        greedy = self.first(number)  # this scores them too
        value = {layer: float(self.scores[layer]) for layer in mixers}
        runs = [mixers[start : start + number] for start in range(len(mixers) - number + 1)]
        run = min(runs, key=lambda layers: sum(value[layer] for layer in layers))
        found = (greedy, sorted(mixers, key=value.__getitem__)[:number], run)
        return tuple(dict.fromkeys(tuple(sorted(layers)) for layers in found))

    def _fixed(self, budget: Budget) -> Sequence[Start] | None:
        """What the caller said that goes."""
        if self.dropped is not None:
            return [tuple(sorted(self.dropped))]
        number = budget.count(len(self.judge.mixers))
        return None if number is None else self.drops(number)

    def rounds(self, most: float, budget: Budget) -> Iterable[Sequence[Start]]:
        """As few attentions as the depth needs; for a latency more and more, since each makes a step quicker, too."""
        fixed, mixers = self._fixed(budget), len(self.judge.mixers)
        if fixed is not None:
            return [fixed]
        if self.price.by_depth:
            return [self.drops(min(mixers, max(0, self.judge.ffns - int(most))))]
        by_number = (
            [start for start in self.drops(number) if self.least_price(start) <= most * ROUNDING]
            for number in range(mixers + 1)
        )
        return filter(None, by_number)

    def starts_within(self, budget: Budget) -> Sequence[Start]:
        fixed = self._fixed(budget)
        if fixed is not None:
            return fixed
        found: list[Start] = []
        for number in range(len(self.judge.mixers) + 1):
            allowed = [start for start in self.drops(number) if budget.allows(self.unfused(start).quality)]
            if not allowed:
                break  # dropping more costs more
            found = [*allowed, *found]
        return found

    # What to fuse then.

    def without(self, dropped: Sequence[int]) -> Chains:
        """The model without some attention: chains and the dependencies inside them."""
        key = tuple(sorted(dropped))
        if key not in self._chains:
            chains = self.judge.chains(key)
            matrices = self._matrices(key, chains) if chains else []
            self._chains[key] = Chains(key, chains, tuple(matrices), self.judge.ffns, self.limits)
        return self._chains[key]

    def _matrices(self, dropped: Start, chains: Sequence[ChainFacts]) -> list[Tensor]:
        folder = None if self.cache is None else os.path.join(self.cache, "matrix_" + "_".join(map(str, dropped)))
        model, batches, shown = self.judge.model, self.judge.batches, self.progress
        matrix = dependency_matrix(model, batches, unit="ffn", dropped_attention=dropped, resume=folder, progress=shown)
        place: dict[Member, int] = {name: index for index, name in enumerate(matrix.names)}
        place |= {layer: index for index, layer in enumerate(matrix.layers)}
        rows = [[place[member] for member in chain.members] for chain in chains]
        return [matrix.values[row][:, row] for row in rows]

    def bytes_of(self, plan: FusionPlan) -> int:
        chains = self.judge.chains(plan.dropped_attention)
        size = {name: size for chain in chains for name, size in zip(chain.members, chain.bytes, strict=True)}
        return sum(size[member] for group in plan.groups for member in group)

    def least_price(self, start: Start) -> float:
        groups = [chain.members for chain in self.judge.chains(start)]
        return self.price.of(FusionPlan(dropped_attention=sorted(start), groups=groups))

    def depths(self, dropped: Sequence[int]) -> range:
        """The numbers of FFNs that can be had, from the fewest to all."""
        chains = self.without(dropped)
        return range(chains.shallowest, chains.ffns + 1)

    def ladder(self, start: Start) -> list[Rung]:
        chains = self.without(start)
        if not self.price.by_depth:
            plans = (chains.plan(groups) for depth in self.depths(start) for groups in chains.candidates(depth))
            return [(price, 0.0) for price in sorted({self.price.of(plan) for plan in plans}, reverse=True)]
        return [(float(depth), 0.0) for depth in reversed(self.depths(start))]

    def _plans_at(self, chains: Chains, most: float) -> list[FusionPlan]:
        """The candidates at the depth asked for; at a latency those of the greatest depth that reaches it."""
        depths = [int(most)] if self.price.by_depth else reversed(self.depths(chains.dropped))
        for depth in depths:
            plans = [chains.plan(groups, self.norm or "fold") for groups in chains.candidates(depth)]
            reached = [plan for plan in plans if self.price.of(plan) <= most * ROUNDING]
            if reached:
                return reached
        return []

    def try_at(self, start: Start, most: float, budget: Budget = ANYTHING, on_the_way: bool = False) -> Measured | None:
        """The best of all candidates within the budget's quality at a price.

        The plainest one is kept unless the best is measured better, beyond what chance gives the best of so many. It
        is the paper's rule where that reaches the depth: even cuts without the ends of a chain, the last member's norm
        (where the norm is free), which is kept in the same way.
        """
        chains = self.without(start)
        tried = map(self.measure, self._plans_at(chains, most))
        found = [one for one in tried if budget.allows(one.quality)]
        if not found:
            return None
        by_eye = found[0].plan.groups == chains.equal_cuts(found[0].depth, 1, 1)
        plainest = self._with_better_norm(found[0], "last" if by_eye else "fold", budget)
        best = min(found, key=_cost)
        if best is found[0] or not self._is_better(best, plainest, choices=len(found) - 1):
            return plainest
        return self._with_better_norm(best, "fold", budget)

    def _with_better_norm(self, fold: Measured, kept: NormMode, budget: Budget) -> Measured:
        """The same groups with the norm mode to be kept, or with the other one where that is measured better."""
        if self.norm is not None or not fold.plan.groups:
            return fold
        last = self.measure(fold.plan.replace(norm="last"))
        if not budget.allows(last.quality):
            return fold
        one, other = (fold, last) if kept == "fold" else (last, fold)
        return other if self._is_better(other, one) else one

    def _is_better(self, one: Measured, than: Measured, choices: int = 1) -> bool:
        return one.cost < than.cost and self.judge.difference(one.plan, than.plan).below_zero(choices)

    # Without a price or a quality: all that can be fused.

    def fused(self, dropped: Sequence[int]) -> Measured:
        """As few FFNs as the limits allow."""
        price = self.ladder(tuple(dropped))[-1][0]
        found = self.try_at(tuple(dropped), price)
        assert found is not None, "what is shallowest is itself a candidate"
        return found

    def fewest(self, budget: Budget) -> Measured:
        """The best of what to drop, everything fused but the costly ends."""
        starts = self._fixed(budget) or [()]
        return self.without_costly_ends(min(map(self.fused, starts), key=_cost))

    def without_costly_ends(self, full: Measured) -> Measured:
        """Leave out the last or leading FFN of a chain where measurement says that it costs more than its share."""
        chains = self.without(full.plan.dropped_attention)
        unfused = self.measure(chains.plan((), self.norm or "fold"))
        best = full
        ends = [(chain.members[-1], chain.members[0] if chain.leading else None) for chain in chains.chains]
        for member in (member for pair in ends for member in pair if member is not None):
            groups = [tuple(other for other in group if other != member) for group in best.plan.groups]
            smaller = self.measure(chains.plan([group for group in groups if len(group) > 1], best.plan.norm))
            others = unfused.depth - smaller.depth  # merges that remain
            if smaller.depth == best.depth or others == 0:
                continue
            share = max(smaller.cost - unfused.cost, 0.0) / others
            if best.cost - smaller.cost > max(_UNFAIR * share, _NOTICED):
                best = smaller
        return best

    # Reports.

    def why_none(self, starts: Sequence[Start], most: float | None) -> str:
        lines = []
        for start in starts or ([self.judge.mixers] if most is not None else []):
            prices = [price for price, _ in self.ladder(start)]
            lowest = self.price.text(prices[-1]).split()[0]
            lines.append(
                f"without the attention of {list(start)}: {lowest} to {self.price.text(prices[0])}, and "
                f"{self.unfused(start).cost:+.3f} nats before anything is fused"
            )
        return "no plan fits the budget; " + ("; ".join(lines) or "the intact model itself is outside it")

    def every_depth(self, drops: Sequence[int] | None) -> Iterator[tuple[Start, int]]:
        """By default about six numbers of dropped attentions, from none to half of them."""
        half = len(self.judge.mixers) // 2
        even = sorted({round(index * half / (_MOST_DROPS - 1)) for index in range(_MOST_DROPS)})
        for number in each(even if drops is None else drops, self.progress, "sweep"):
            for start in self.drops(number):
                yield from ((start, depth) for depth in self.depths(start))


def _cost(measured: Measured) -> float:
    return measured.cost
