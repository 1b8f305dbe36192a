"""The search in chains: within the budget, the best that was measured; and what make_plan and sweep keep of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfusion.analysis import meter as meter_file
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Estimate, Quality
from fxfusion.analysis.scores import attention_scores
from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import NormMode
from fxfusion.planning import chains as module
from fxfusion.planning.budget import Budget, Limits
from fxfusion.planning.chains import ChainSearch
from fxfusion.planning.make_plan import make_plan
from fxfusion.planning.price import depth_price
from fxfusion.planning.sweep import run_sweep
from tests.tiny_lm import TinyLm, ids, traced

BATCHES = [ids(3, 9, seed=5), ids(3, 9, seed=6)]
LAYERS = 5
NORMS: tuple[NormMode, ...] = ("fold", "last")


def searching(meter: PlanMeter, **more: Any) -> ChainSearch:
    """By FFN depth."""
    return ChainSearch(judge=meter, price=depth_price(meter.ffns), **more)


@pytest.fixture(scope="module")
def search() -> ChainSearch:
    """One search for all tests that only ask; what it measured stays known."""
    return searching(PlanMeter(traced(LAYERS), BATCHES))


def test_a_fraction_of_the_attention_is_dropped_and_fused(search: ChainSearch) -> None:
    found = search.choose(Budget(drop=0.4))
    assert len(found.plan.dropped_attention) == 2 and found.depth <= LAYERS
    assert found.depth == LAYERS - sum(len(group) - 1 for group in found.plan.groups)
    fused = [member for group in found.plan.groups for member in group]
    assert fused and found.fused_bytes == sum(search.judge.members[member][1] for member in fused)


def test_at_a_depth_the_best_of_all_proposals_is_taken(search: ChainSearch) -> None:
    found = search.choose(Budget(target_depth=3))
    assert found.depth == 3
    rivals = [
        search.measure(chains.plan(groups))
        for chains in map(search.without, search.drops(LAYERS - 3))
        for groups in chains.candidates(3)
    ]
    alone = search.choose(Budget(target_depth=3, drop=2))
    assert len(rivals) > 1 and max(rival.cost for rival in rivals) > found.cost, "and there was something to choose"
    better = [search.judge.difference(rival.plan, found.plan) for rival in rivals]
    assert not any(difference.below_zero(choices=len(rivals)) for difference in better)
    assert alone.depth == 3


def test_quality_limits_bind(search: ChainSearch) -> None:
    loose = search.choose(Budget(max_kl=1e9))
    assert loose.depth == 1 and len(loose.plan.dropped_attention) >= LAYERS - 1
    costs = sorted(float(search.unfused((layer,)).quality.kl or 0.0) for layer in range(LAYERS))
    tight = search.choose(Budget(max_kl=costs[0] / 2))
    assert tight.plan == FusionPlan() and tight.depth == LAYERS
    middle = search.choose(Budget(max_kl=costs[-1]))
    assert float(middle.quality.kl or 9.0) <= costs[-1] and loose.depth <= middle.depth < tight.depth


def test_what_cannot_be_had_says_what_can(search: ChainSearch) -> None:
    with pytest.raises(PlanError, match=r"no plan fits the budget; without the attention of \[.*\]: . to 5 FFNs"):
        search.choose(Budget(drop=1, target_depth=1))
    with pytest.raises(PlanError, match="nats before anything is fused"):
        search.choose(Budget(drop=2, max_kl=1e-9))
    with pytest.raises(OptionError, match="the model has 5"):
        search.choose(Budget(drop=6))


def test_limits_reach_the_groups() -> None:
    limited = searching(PlanMeter(traced(LAYERS), BATCHES), limits=Limits(max_members=2))
    found = limited.fused((1, 2, 3, 4))
    assert max(len(group) for group in found.plan.groups) == 2
    free = searching(limited.judge).fused((1, 2, 3, 4))
    assert max(len(group) for group in free.plan.groups) == 5


class PricedMeter(PlanMeter):
    """A meter whose losses are set by hand: so much for each merge, so much more where a group has a member, and for
    `norm="last"`. The interval of a difference reaches `noise` to both sides."""

    def __init__(
        self, per_merge: float, extra: dict[int, float] | None = None, last: float = 0.0, noise: float = 0.0
    ) -> None:
        super().__init__(traced(LAYERS), BATCHES)
        self.per_merge, self.extra, self.last, self.noise = per_merge, extra or {}, last, noise

    def price(self, plan: FusionPlan) -> float:
        members = [member for group in plan.groups for member in group]
        price = self.per_merge * (len(members) - len(plan.groups)) + self.last * (plan.norm == "last")
        return price + sum(more for layer, more in self.extra.items() if layer in members)

    def quality(self, plan: FusionPlan) -> Quality:
        one = Estimate(*[self.price(plan)] * 3)
        return Quality(loss=one, perplexity=one.exp(), tokens=1, sequences=2, kl=one, top1=one, loss_increase=one)

    def difference(self, plan: FusionPlan, other: FusionPlan) -> Estimate:
        value = self.price(plan) - self.price(other)
        return Estimate(value, value - self.noise, value + self.noise)


@pytest.mark.parametrize(
    ("per_merge", "extra", "group"),
    [
        (0.01, {}, (1, 2, 3, 4)),  # all merges alike
        (0.01, {4: 0.2}, (1, 2, 3)),  # the last costs far more than its share
        (0.01, {1: 0.2}, (2, 3, 4)),  # the leading one does
        (0.01, {1: 0.2, 4: 0.5}, (2, 3)),
        (0.01, {2: 0.2}, (1, 2, 3, 4)),  # one inside: the chain is not cut there
        (0.0001, {4: 0.005}, (1, 2, 3, 4)),  # more than its share, but nobody would notice
    ],
)
def test_a_costly_end_stays_out_and_a_cheap_one_does_not(
    per_merge: float, extra: dict[int, float], group: tuple[int, ...]
) -> None:
    priced = searching(PricedMeter(per_merge, extra), norm="fold")
    full = priced.fused((2, 3, 4))
    assert full.plan.groups == ((1, 2, 3, 4),)
    assert priced.without_costly_ends(full).plan.groups == (group,)


@pytest.mark.parametrize(
    ("last", "noise", "fixed", "chosen"),
    [
        (0.1, 0.01, None, "fold"),  # measured better
        (0.1, 0.2, None, "last"),  # perhaps better: the paper's rule stays
        (0.0, 0.0, None, "last"),  # alike
        (-0.1, 0.01, None, "last"),
        (0.1, 0.01, "last", "last"),  # asked for
        (-0.1, 0.01, "fold", "fold"),
    ],
)
def test_the_papers_norm_stays_unless_the_members_own_are_measured_better(
    last: float, noise: float, fixed: NormMode | None, chosen: NormMode
) -> None:
    priced = searching(PricedMeter(0.01, last=last, noise=noise), norm=fixed)
    found = priced.try_at((1, 2, 3, 4), 3)
    assert found is not None and found.plan.norm == chosen
    assert found.plan.groups == priced.without((1, 2, 3, 4)).equal_cuts(3, 1, 1) == ((1, 2, 3),)


@pytest.mark.parametrize(
    ("gain", "noise", "inside"),
    [(0.1, 0.01, False), (0.1, 0.09, True), (0.1, 0.2, True), (-0.1, 0.01, True)],
)
def test_other_groups_are_taken_only_if_measured_better(gain: float, noise: float, inside: bool) -> None:
    """Layer 2 costs more, and one proposal fuses without it; an interval that only just excludes zero is not enough
    for the best of several."""
    found = searching(PricedMeter(0.01, {2: gain}, noise=noise)).try_at((1, 2, 3, 4), 3)
    assert found is not None and found.plan.groups == (((1, 2, 3),) if inside else ((0, 1), (3, 4)))


def test_a_budget_takes_what_keeps_it_even_if_not_surely_better() -> None:
    priced = searching(PricedMeter(0.01, {2: 0.1}, last=0.3, noise=0.2))
    dropped = (1, 2, 3, 4)
    free, bound = priced.try_at(dropped, 3), priced.try_at(dropped, 3, Budget(max_kl=0.05))
    assert free is not None and free.plan.groups == ((1, 2, 3),)
    assert bound is not None and bound.plan.groups == ((0, 1), (3, 4)) and bound.plan.norm == "fold"
    between = priced.try_at(dropped, 3, Budget(max_kl=0.15))
    assert between is not None and between.plan.groups == ((1, 2, 3),) and between.plan.norm == "fold"
    assert priced.try_at(dropped, 3, Budget(max_kl=0.01)) is None


def test_beyond_the_papers_rule_own_norms_stay_unless_the_last_is_measured_better() -> None:
    for last, noise, chosen in ((-0.1, 0.2, "fold"), (-0.1, 0.01, "last")):
        found = searching(PricedMeter(0.01, last=last, noise=noise)).fused((1, 2, 3, 4))
        assert found.plan.groups == ((0, 1, 2, 3, 4),) and found.plan.norm == chosen


def test_both_norms_are_measured_on_the_model(search: ChainSearch) -> None:
    chains = search.without((1, 2, 3, 4))
    fold, last = (search.measure(chains.plan([(1, 2, 3)], norm)) for norm in NORMS)
    assert fold.cost != last.cost and fold.plan.norm == "fold" and last.plan.norm == "last"
    difference = search.judge.difference(fold.plan, last.plan)
    assert difference.value == pytest.approx(fold.cost - last.cost, abs=1e-6)
    assert difference.low <= difference.value <= difference.high
    itself = search.judge.difference(last.plan, last.plan)
    assert itself == Estimate(0.0, 0.0, 0.0) and not itself.below_zero()


def test_make_plan_records_what_made_it(tmp_path: Path) -> None:
    model = TinyLm(LAYERS)
    plan = make_plan(model, BATCHES, drop=2, method="cosine", cache=tmp_path, command="test")
    assert plan.model is not None and plan.model.layers == LAYERS and plan.made_by is not None
    assert plan.scores is not None and plan.scores.method == "cosine" and len(plan.scores.values) == LAYERS
    path = tmp_path / "plan.yaml"
    plan.save(path)
    assert FusionPlan.load(path) == plan


def test_a_second_plan_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyLm(LAYERS)
    first = make_plan(model, BATCHES, drop=2, cache=tmp_path)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was measured before")

    monkeypatch.setattr(meter_file, "evaluate", again)
    second = make_plan(model, BATCHES, drop=2, cache=tmp_path)
    assert second.groups == first.groups and second.dropped_attention == first.dropped_attention
    with pytest.raises(AssertionError, match="measured before"):
        make_plan(model, BATCHES, drop=3, cache=tmp_path)


def test_a_cache_of_another_model_or_text_is_refused(tmp_path: Path) -> None:
    PlanMeter(traced(LAYERS), BATCHES, tmp_path).quality(FusionPlan())
    with pytest.raises(OptionError, match=r"another measurement \(text is"):
        PlanMeter(traced(LAYERS), BATCHES[:1], tmp_path)
    with pytest.raises(OptionError, match=r"another measurement \(model is"):
        PlanMeter(TinyLm(LAYERS + 1), BATCHES, tmp_path)


def test_the_preset_leaves_the_ends_out() -> None:
    plan = make_plan(TinyLm(LAYERS), BATCHES, dropped_attention=(1, 2, 3, 4), preset="paper")
    assert plan.groups == ((1, 2, 3),) and plan.norm == "last", "0 leads, 4 is last"
    with pytest.raises(OptionError, match="splits: it goes with preset='paper'"):
        make_plan(TinyLm(LAYERS), BATCHES, splits=[2])
    with pytest.raises(PlanError, match="no group begins at layer 0"):
        make_plan(TinyLm(LAYERS), BATCHES, dropped_attention=(1, 2, 3, 4), preset="paper", splits=[0])


def test_only_as_many_attentions_are_dropped_greedily_as_are_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def scored(*given: Any, drop: int | None = None, **more: Any) -> Any:
        asked.append(drop)
        return attention_scores(*given, drop=drop, **more)

    monkeypatch.setattr(module, "attention_scores", scored)
    fresh = searching(PlanMeter(traced(LAYERS), BATCHES))
    first = [fresh.first(number) for number in (2, 1, 3, LAYERS)]
    assert asked == [2, 4, LAYERS], "2 and 1 are known, 3 is twice as many, and no more than there are"
    assert [len(one) for one in first] == [2, 1, 3, LAYERS] and all(one == first[-1][: len(one)] for one in first)
    assert fresh.first(LAYERS) == first[-1] and len(asked) == 3


def test_a_sweep_has_a_front(search: ChainSearch, tmp_path: Path) -> None:
    found = run_sweep(search, (0, 1, 3))
    assert {len(point.measured.plan.dropped_attention) for point in found.points} == {0, 1, 3}
    front = found.front
    assert [p.measured.depth for p in front] == sorted({p.measured.depth for p in front})
    for point in found.points:
        beaten = any(
            other.measured.depth <= point.measured.depth and other.measured.cost < point.measured.cost
            for other in found.points
        )
        assert point.on_front != beaten or (beaten is False and point.on_front is False)
    lines = found.to_csv(tmp_path / "sweep.csv").read_text().splitlines()
    assert len(lines) == len(found.points) + 1 and lines[0].startswith("depth,dropped,fused_bytes")
    for suffix in ("svg", "png"):
        assert found.plot(tmp_path / f"sweep.{suffix}").stat().st_size > 1000


def test_the_measured_quality_is_that_of_the_plan(search: ChainSearch) -> None:
    found = search.choose(Budget(drop=2))
    model = search.judge.model
    losses = []
    for batch in BATCHES:
        logits = model.planned(batch, found.plan.dropped_attention, found.plan.groups)
        losses.append(_loss(logits, batch) - _loss(model(batch), batch))
    assert found.cost == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def _loss(logits: Tensor, batch: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))
