"""Measures plans after their refit: fitted on one part of the text, judged on the other, and remembered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fxfusion.analysis.batches import Batch, text_key
from fxfusion.analysis.meter import PlanMeter, Qualities, plan_key
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.recovery.refit import refit

# Tokens: windows are screened on few, since there are many of them; a choice between the best few takes more; and
# those that a refit is tried with are few too, since it is tried often. The refit that follows the plan takes all.
_SCREENED, _JUDGED, _FITTED = 2048, 4096, 8192
_JUDGES = 4  # at most one batch in so many judges


def divided(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What to fit to, and what to judge by. Raises `OptionError` where there are fewer than two batches."""
    if len(batches) < 2:
        raise OptionError("after_refit needs two batches at least: one to fit to, one to judge by")
    judged = first(batches[: max(1, len(batches) // _JUDGES)], _JUDGED)
    return first(batches[len(judged) :], _FITTED), judged


def screened(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that windows are screened on."""
    return first(batches, _SCREENED)


def first(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """As many of the first batches as hold so many tokens, one at least."""
    found: list[Batch] = []
    held = 0
    for batch in batches:
        if held < tokens:
            found.append(batch)
        held += (batch if isinstance(batch, Tensor) else batch["input_ids"]).numel()
    return found


class RefitMeter:
    """Quality of plans after `refit` towards the intact model. `meter`: measures the same plans as they are.

    `cache`: a folder; a plan that was refitted there before is not refitted again.
    """

    def __init__(self, meter: PlanMeter, fitted: Sequence[Batch], cache: str | os.PathLike[str] | None = None) -> None:
        self.meter, self.fitted = meter, list(fitted)
        path = None if cache is None else Path(cache) / "refitted_plans.json"
        self.known = Qualities(path, lambda: {**meter.facts(), "fitted": text_key(self.fitted)})

    def knows(self, plan: FusionPlan) -> bool:
        """Whether it was measured before."""
        return self.known.get(plan_key(plan)) is not None

    def quality(self, plan: FusionPlan) -> Quality:
        """Loss on the judging text, and what is lost against the intact model; a plan of nothing is that itself."""
        if not plan.groups and not plan.dropped_attention:
            return self.meter.quality(plan)
        return self.known.of(plan_key(plan), lambda: self._measured(plan))

    def _measured(self, plan: FusionPlan) -> Quality:
        refitted = refit(self.meter.model, plan, self.fitted, reference="intact")
        return evaluate(refitted, self.meter.batches, self.meter.intact())
