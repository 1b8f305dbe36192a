"""From options to the best plan over several roads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from torch import nn

from fxfusion.analysis.batches import Batch
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.store import inside
from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.policy import NormMode
from fxfusion.planning.budget import Budget, Limits, Measured
from fxfusion.planning.price import Price, depth_price, predicted_latency
from fxfusion.planning.scores import ROADS, RefitMeter, Road, Screen, check_roads, divided, screened
from fxfusion.planning.windows import RoadSearch

AUTOMATIC_INCREASE = 0.01  # of the perplexity
AUTOMATIC_HARDWARE = "h100"
_MAX_WINDOW = 6
# What is refitted is a model of wider modules. No other engine loads one with wide blocks, so they are not chosen
# unless they are asked for.
REFITTED: tuple[Road, ...] = ("drop", "hoist")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoadOptions:
    """`roads`: which may be taken. `after_refit`: judge plans after their refit. `max_window`: layers of a window.

    `hardware`, `tp`, `precision`: for which device the latency is predicted; without hardware, the FFN depth
    counts instead. `max_latency` [ms]: of one decoded token.
    """

    roads: Sequence[Road]
    after_refit: bool = False
    max_window: int | None = None
    hardware: str | None = None
    tp: int = 1
    precision: str = "bf16"
    max_latency: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "roads", check_roads(self.roads))
        if self.max_latency is not None and not self.max_latency > 0:
            raise OptionError(f"max_latency: expected milliseconds above 0, got {self.max_latency!r}")
        if self.max_latency is not None and self.hardware is None:
            raise OptionError("max_latency: name the hardware that it is predicted for, such as hardware='h100'")

    def check_budget(self, budget: Budget) -> None:
        """Raises `OptionError` for a budget that roads cannot keep, or none at all."""
        if budget.drop is not None:
            raise OptionError(
                "drop: over several roads the planner itself decides what is dropped; name another budget"
            )
        if budget.target_depth is not None and self.max_latency is not None:
            raise OptionError("target_depth and max_latency were both given; give one of them")
        if budget.target_depth is None and self.max_latency is None and not budget.limits_quality:
            raise OptionError("roads need a budget: target_depth, max_latency, max_perplexity_increase or max_kl")


class RoadArguments(TypedDict, total=False):
    """Arguments of `make_plan` that are about roads; each None, or the default of `RoadOptions`, where not given."""

    roads: Sequence[Road] | None
    after_refit: bool | None
    max_window: int | None
    hardware: str | None
    tp: int
    precision: str
    max_latency: float | None


def road_options(given: RoadArguments, budget: Budget, automatic: bool) -> tuple[RoadOptions, Budget]:
    """What was asked for; `automatic` fills in what was not. Raises `TypeError` for an unknown argument."""
    _check_known(given)
    wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not automatic:
        return RoadOptions(**wanted), budget
    after_refit = wanted.setdefault("after_refit", True)
    automatically: dict[str, Any] = {"roads": REFITTED if after_refit else ROADS, "hardware": AUTOMATIC_HARDWARE}
    options = RoadOptions(**automatically | wanted)
    has_bound = budget.limits_quality or budget.target_depth is not None or options.max_latency is not None
    return options, budget if has_bound else replace(budget, max_perplexity_increase=AUTOMATIC_INCREASE)


def check_unused(given: RoadArguments) -> None:
    """Raises `OptionError` for an argument that means nothing without roads."""
    _check_known(given)
    defaults = {field.name: field.default for field in fields(RoadOptions)}
    for name, value in given.items():
        if value is not None and value != defaults[name]:
            raise OptionError(f"{name}: goes with roads or preset='automatic'")


def _check_known(given: RoadArguments) -> None:
    unknown = [name for name in given if name not in RoadArguments.__annotations__]
    if unknown:
        raise TypeError(f"make_plan() got an unexpected keyword argument {unknown[0]!r}")


def search_for(
    model: nn.Module,
    batches: Sequence[Batch],
    options: RoadOptions,
    budget: Budget,
    limits: Limits | None = None,
    norm: NormMode | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> RoadSearch:
    """Everything that is needed to look for plans within a budget; nothing is measured yet."""
    options.check_budget(budget)
    fitted, judged = divided(batches) if options.after_refit else ([], list(batches))
    folder = inside(cache, "roads_after_refit" if options.after_refit else "roads")
    judge = PlanMeter(model, judged, folder)
    judge.refuse_hidden_ffns()
    less = screened(judged)
    meter = judge if len(less) == len(judged) else PlanMeter(judge.traced, less, inside(folder, "screen"))
    screen = Screen(
        meter,
        tuple(options.roads),
        norm=norm or "fold",
        limits=limits or Limits(),
        max_window=_MAX_WINDOW if options.max_window is None else options.max_window,
        progress=progress,
        in_modules=options.after_refit,
    )
    refitted = RefitMeter(judge, fitted, folder) if options.after_refit else None
    return RoadSearch(screen, _price(meter, options, budget), judge, refitted)


def choose(search: RoadSearch, options: RoadOptions, budget: Budget) -> Measured:
    """The best plan within the budget: at a depth or latency the one of least loss, else the one of least price.

    Raises `PlanError` where there is none.
    """
    options.check_budget(budget)
    most = float(budget.target_depth) if budget.target_depth is not None else options.max_latency
    if most is None:
        return search.cheapest(budget)
    found = search.best_at(most)
    if not budget.allows(found.quality):
        raise PlanError(
            f"no plan fits the budget; at {search.price.text(most)} the best one costs {found.cost:+.4f} nats per token"
        )
    return found


def _price(meter: PlanMeter, options: RoadOptions, budget: Budget) -> Price:
    if options.hardware is None or budget.target_depth is not None:
        return depth_price(meter.ffns)
    return predicted_latency(meter, options.hardware, options.tp, options.precision)
