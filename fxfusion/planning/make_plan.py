"""`make_plan`: one call from a model and a text to a plan that can be saved, compiled and applied."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Batch, Quality
from fxfusion.analysis.scores import AttentionScores, Method
from fxfusion.cost.layer_table import cut_run
from fxfusion.errors import OptionError, PlanError
from fxfusion.models.fingerprint import facts_of
from fxfusion.plan.fusion_plan import FusionPlan, LayerScore, MadeBy, MeasuredQuality, Scores
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Budget, Limits, Measured
from fxfusion.planning.chains import Planner, search
from fxfusion.planning.request import RoadArguments, check_unused, choose, road_options, search_for

if TYPE_CHECKING:
    from typing_extensions import Unpack


def make_plan(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    drop: int | float | None = None,
    dropped_attention: Sequence[int] | None = None,
    max_perplexity_increase: float | None = None,
    max_kl: float | None = None,
    target_depth: int | None = None,
    max_members: int | None = None,
    max_width: int | None = None,
    max_bytes: int | None = None,
    max_dependency: float | None = None,
    norm: NormMode | None = None,
    method: Method = "loss",
    preset: Literal["paper", "automatic"] | None = None,
    splits: Iterable[int] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    command: str | None = None,
    **over_roads: Unpack[RoadArguments],
) -> FusionPlan:
    """Choose which attention to drop and which FFNs to fuse, by measurement, under a budget.

    Args:
        model: a causal language model that is captured as one graph. It is not changed.
        batches: calibration text: `input_ids` `[batch, seq]` or dicts of model inputs; a few thousand tokens.
        drop: how many attention layers to drop (int), or which fraction of them (float up to 1.0).
        dropped_attention: exactly these instead.
        max_perplexity_increase: relative to the intact model on these batches (0.05: 5 %).
        max_kl: largest KL divergence from the intact model, in nats per token.
        target_depth: the FFN depth (FFNs that are computed one after another) that may remain; at least as much
            attention is dropped.
        max_members, max_width [intermediate channels], max_bytes: of one fused FFN.
        max_dependency: largest entry of the dependency matrix inside a group.
        norm: see `FusionPlan`; None measures both and keeps the paper's, `"last"`, on the paper's groups unless
            `"fold"` is measured better. method: see `attention_scores`.
        roads: how FFNs with attention between them may become neighbours: by `"drop"` (dropping it), `"hoist"`
            (moving it before them) or `"wide"` (moving it, as one attention); several may be mixed in one plan. Needs
            a budget: a depth, a latency, or a quality, within which the latency (without hardware: the depth) is
            least. None: the attention is dropped that the arguments above name, and no other is touched.
        after_refit: with roads, judge each plan by its loss after `fxfusion.refit`: three quarters of the batches are
            fitted to, the others judge. Windows that the model's modules cannot hold are left out.
        max_window: layers that become one at most (6).
        hardware, tp, precision: what the latency is predicted for, see `fxfusion.cost`: one token, decoded after
            1,024. max_latency: in milliseconds.
        preset: `"automatic"`: drop and hoist, after refit, within 1 % of the perplexity, the least latency on one H100
            (other arguments change that). `"paper"` leaves the leading and the last FFN of each run out and takes the
            norm of a group's last member; groups are cut at `splits` (layers at which one begins) or where `max_bytes`
            is full, not measured.
        cache: a folder where scores, matrices and measured plans are kept: the next call measures only what is new.
        progress: say how far it is, on the error stream. command: what is noted in the plan as its maker.

    Without any budget only chains that the model has already are fused. Of the plans within the budget the one with
    the fewest FFNs is chosen, among those the one with the least loss (the plainest, if none is measured better); the
    first and last FFN of a chain stay out where measurement says that they cost more than their share.

    Raises:
        OptionError: a budget that cannot be (negative, more layers than there are), or arguments that contradict
            each other.
        PlanError: no plan fits the budget; the message says what is possible.
        CaptureError: the model cannot be captured as one graph.
        SurgeryError: FFNs are hidden by adapters that are active on them.
    """
    budget = Budget(
        drop=drop, max_perplexity_increase=max_perplexity_increase, max_kl=max_kl, target_depth=target_depth
    )
    limits = Limits(max_members=max_members, max_width=max_width, max_bytes=max_bytes, max_dependency=max_dependency)
    if preset == "automatic" or over_roads.get("roads") is not None:
        _check_roads(preset, dropped_attention, splits)
        options, budget = road_options(over_roads, budget, automatic=preset == "automatic")
        searched = search_for(model, list(batches), options, budget, limits, norm, cache, progress)
        return made(choose(searched, options, budget), model, command)
    check_unused(over_roads)
    if drop is not None and dropped_attention is not None:
        raise OptionError("drop and dropped_attention were both given; the second names the layers itself")
    _check_preset(preset, budget, limits, norm, splits)
    planner = Planner(PlanMeter(model, list(batches), cache), limits, norm, method, cache, progress)
    planner.meter.refuse_hidden_ffns()
    if preset is None:
        return recorded(planner, search(planner, budget, dropped_attention).plan, command)
    return recorded(planner, _paper(planner, budget, dropped_attention, splits), command)


def made(found: Measured, model: nn.Module, command: str | None) -> FusionPlan:
    """The plan with its model, quality and maker."""
    quality = quality_record(found.quality)
    return found.plan.replace(model=facts_of(model), quality=quality, made_by=MadeBy.now(command=command))


def _check_roads(preset: str | None, dropped: Sequence[int] | None, splits: Iterable[int] | None) -> None:
    """Raises `OptionError` for arguments that decide what the planner decides over several roads."""
    if dropped is not None or splits is not None:
        raise OptionError("dropped_attention and splits name layers; over several roads the planner does that")
    if preset not in (None, "automatic"):
        raise OptionError(f"preset={preset!r} does not go with roads: the planner decides by measurement there")


def _check_preset(
    preset: str | None, budget: Budget, limits: Limits, norm: NormMode | None, splits: Iterable[int] | None
) -> None:
    """Raises `OptionError` for a budget of quality or depth: a rule measures nothing, so it cannot keep it."""
    if preset is None:
        if splits is not None:
            raise OptionError("splits belong to preset='paper'; the planner cuts by measurement")
        return
    if preset != "paper":
        raise OptionError(f"preset: expected 'paper' or 'automatic', got {preset!r}")
    given = {name: getattr(budget, name) for name in ("max_perplexity_increase", "max_kl", "target_depth")}
    given |= {name: getattr(limits, name) for name in ("max_members", "max_width", "max_dependency")}
    named = next((name for name, value in given.items() if value is not None), None)
    if named is not None:
        raise OptionError(f"{named}: preset='paper' is a rule that keeps no such budget")
    if norm == "fold":
        raise OptionError("norm: preset='paper' takes the norm of a group's last member, norm='last'")


def _paper(planner: Planner, budget: Budget, dropped: Sequence[int] | None, splits: Iterable[int] | None) -> FusionPlan:
    """The paper's rule on the run of attentions that is cheapest to drop (or those given)."""
    if dropped is None:
        number = budget.count(len(planner.meter.mixers)) or 0
        dropped = planner.drops(number)[-1]
    begins, groups = frozenset(splits or ()), []
    for chain in planner.meter.chains(dropped):
        run = chain.members[int(chain.leading) : -1]
        sizes = dict(zip(chain.members, chain.bytes, strict=True))
        groups += [group for group in cut_run(run, begins, sizes, planner.limits.max_bytes) if len(group) > 1]
    useless = begins - {group[0] for group in groups}
    if useless:
        raise PlanError(f"splits: no group begins at layer {min(useless)}")
    return FusionPlan(groups=groups, dropped_attention=sorted(dropped), norm="last")


def recorded(planner: Planner, plan: FusionPlan, command: str | None = None) -> FusionPlan:
    """The plan with what it was made for, from and by."""
    scores = planner.known_scores
    return FusionPlan(
        groups=plan.groups,
        dropped_attention=plan.dropped_attention,
        norm=plan.norm,
        model=facts_of(planner.meter.model),
        scores=None if scores is None else _scores(scores),
        quality=quality_record(planner.meter.known_quality(plan)),
        made_by=MadeBy.now(command=command),
    )


def quality_record(found: Quality | None) -> MeasuredQuality | None:
    """What a plan keeps of its measured quality; None where nothing was measured (a rule measures nothing)."""
    if found is None:
        return None
    given = {name: getattr(found, name) for name in ("loss_increase", "kl", "top1")}
    numbers = {name: float(value) for name, value in given.items() if value is not None}
    return MeasuredQuality(perplexity=float(found.perplexity), tokens=found.tokens, **numbers)


def _scores(scores: AttentionScores) -> Scores:
    return Scores(
        method=scores.method,
        values=tuple(
            LayerScore(layer=score.layer, value=float(score.value), error=score.error) for score in scores.scores
        ),
    )
