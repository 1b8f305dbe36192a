"""`make_plan`: one call from a model and a text to a plan that can be saved, compiled and applied."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from fxfusion.analysis.batches import Batch, text_key
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.scores import AttentionScores, Method
from fxfusion.analysis.store import Store, inside, model_key
from fxfusion.analysis.window_meter import WindowMeter
from fxfusion.cost import Hardware
from fxfusion.cost.layer_table import cut_run
from fxfusion.errors import PlanError
from fxfusion.models.fingerprint import facts_of
from fxfusion.plan.fusion_plan import FusionPlan, LayerScore, MadeBy, MeasuredQuality, Scores
from fxfusion.plan.policy import NormMode
from fxfusion.planning.chains import ChainSearch
from fxfusion.planning.choice import Search
from fxfusion.planning.halving import Halving
from fxfusion.planning.price import Price, depth_price, predicted_latency
from fxfusion.planning.request import Request
from fxfusion.planning.scores import RefitMeter, Screen, divided, in_fours, screened
from fxfusion.planning.windows import WindowSearch

MAX_WINDOW = 6
Cache = str | os.PathLike[str] | None


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
    cache: Cache = None,
    progress: bool = False,
    command: str | None = None,
    roads: Sequence[str] | None = None,
    after_refit: bool | None = None,
    max_window: int | None = None,
    hardware: str | os.PathLike[str] | Hardware | None = None,
    tp: int = 1,
    precision: str = "bf16",
    max_latency: float | None = None,
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
            (moving it before them) or `"wide"` (moving it, as one attention); or `"remove"`: whole layers go, which
            `fuse` does and the compiler does not. Several may be mixed in one plan. Needs a budget: a depth, a latency,
            or a quality, within which the latency (without hardware: the depth) is least. None: the attention is
            dropped that the arguments above name or need, and no other is touched.
        after_refit: with roads, judge each plan by its loss after `fxfusion.refit`: three quarters of the batches are
            fitted to, the others judge. Windows that the model's modules cannot hold are left out.
        max_window: layers that become one at most (6).
        hardware, tp, precision: what the latency is predicted for, see `fxfusion.cost`: one token, decoded after
            1,024. max_latency: in milliseconds; the plan of least loss that is predicted to take no longer.
        preset: `"automatic"`: drop and hoist, after refit, within 1 % of the perplexity, the least latency on one H100
            (other arguments change that). `"paper"` leaves the leading and the last FFN of each run out and takes the
            norm of a group's last member; groups are cut at `splits` (layers at which one begins) or where `max_bytes`
            is full, not measured.
        cache: a folder where scores, matrices and measured plans are kept: the next call measures only what is new.
        progress: say how far it is, on the error stream. command: what is noted in the plan as its maker.

    Without any budget only chains that the model has already are fused. Of the plans within the budget the one with
    the fewest FFNs (with hardware: the least latency) is chosen, among those the one with the least loss (the plainest,
    if none is measured better); the first and last FFN of a chain stay out where measurement says that they cost more
    than their share.

    Raises:
        OptionError: a budget that cannot be (negative, more layers than there are), or arguments that contradict
            each other.
        PlanError: no plan fits the budget; the message says what is possible.
        CaptureError: the model cannot be captured as one graph.
        SurgeryError: FFNs are hidden by adapters that are active on them.
    """
    asked = Request.of(locals())
    search = search_for(model, list(batches), asked, method, cache, progress)
    return recorded(search, planned(search, asked), command)


def search_for(
    model: nn.Module,
    batches: Sequence[Batch],
    asked: Request,
    method: Method = "loss",
    cache: Cache = None,
    progress: bool = False,
) -> Search:
    """Everything that is needed to look for plans; nothing is measured yet."""
    if asked.roads is not None:
        return _over_roads(model, batches, asked, cache, progress)
    judge = PlanMeter(model, batches, cache)
    judge.refuse_hidden_ffns()
    return ChainSearch(
        judge=judge,
        price=_price(judge, asked),
        progress=progress,
        limits=asked.limits,
        norm=asked.norm,
        method=method,
        dropped=None if asked.dropped_attention is None else tuple(asked.dropped_attention),
        cache=cache,
    )


def _over_roads(model: nn.Module, batches: Sequence[Batch], asked: Request, cache: Cache, progress: bool) -> Search:
    fitted, judged = divided(batches) if asked.after_refit else ([], list(batches))
    folder = inside(cache, "roads_after_refit" if asked.after_refit else "roads")
    judge = PlanMeter(model, judged, folder)
    judge.refuse_hidden_ffns()
    less = screened(judged)
    meter = judge if len(less) == len(judged) else PlanMeter(judge.traced, less, inside(folder, "screen"))
    screen = Screen(
        meter,
        tuple(asked.roads or ()),
        norm=asked.norm or "fold",
        limits=asked.limits,
        max_window=asked.max_window or MAX_WINDOW,
        progress=progress,
        in_modules=bool(asked.after_refit),
        halving=_halving(meter, less, inside(folder, "windows.json")),
    )
    refitted = RefitMeter(judge, fitted, folder) if asked.after_refit else None
    return WindowSearch(judge=judge, price=_price(meter, asked), progress=progress, screen=screen, refitted=refitted)


def _halving(meter: PlanMeter, batches: Sequence[Batch], path: Path | None) -> Halving:
    parts = in_fours(batches)
    store = Store(path, "measured windows", lambda: {"model": model_key(meter.traced), "text": text_key(parts)})
    return Halving(WindowMeter(meter.traced, parts), store)


def _price(meter: PlanMeter, asked: Request) -> Price:
    """What is to be low: the predicted latency where a device is named and no depth."""
    if asked.hardware is None or asked.every_depth or asked.budget.target_depth is not None:
        return depth_price(meter.ffns)
    return predicted_latency(meter, asked.hardware, asked.tp, asked.precision)


def planned(search: Search, asked: Request) -> FusionPlan:
    """The plan that was asked for: the best that is measured, or what the paper's rule says."""
    if asked.preset != "paper":
        return search.choose(asked.budget).plan
    assert isinstance(search, ChainSearch), "the paper's rule goes without roads"
    return _by_the_papers_rule(search, asked)


def _by_the_papers_rule(search: ChainSearch, asked: Request) -> FusionPlan:
    """On the run of attentions that is cheapest to drop (or those given)."""
    dropped = search.dropped
    if dropped is None:
        dropped = search.drops(asked.budget.count(len(search.judge.mixers)) or 0)[-1]
    begins, groups = frozenset(asked.splits or ()), []
    for chain in search.judge.chains(dropped):
        run = chain.members[int(chain.leading) : -1]
        sizes = dict(zip(chain.members, chain.bytes, strict=True))
        groups += [group for group in cut_run(run, begins, sizes, asked.limits.max_bytes) if len(group) > 1]
    useless = begins - {group[0] for group in groups}
    if useless:
        raise PlanError(f"splits: no group begins at layer {min(useless)}")
    return FusionPlan(groups=groups, dropped_attention=sorted(dropped), norm="last")


def recorded(search: Search, plan: FusionPlan, command: str | None = None, seed: int | None = None) -> FusionPlan:
    """The plan with what it was made for, from and by."""
    scores, known = search.known_scores, search.found.get(plan)
    quality = search.judge.known_quality(plan) if known is None else known.quality
    return plan.replace(
        model=facts_of(search.judge.model),
        scores=None if scores is None else _scores(scores),
        quality=_quality_record(quality),
        made_by=MadeBy.now(command=command, seed=seed),
    )


def _quality_record(found: Quality | None) -> MeasuredQuality | None:
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
