"""What `fxfusion plan --roads` does: look for windows, write the plan, say what it costs. Imported when it is used."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fxfusion.cli import evaluation_tables
from fxfusion.cli.options import show_layers, show_members
from fxfusion.cli.results_folder import COMPILED, PLAN
from fxfusion.cli.session import Session
from fxfusion.models.fingerprint import facts_of
from fxfusion.plan.fusion_plan import FusionPlan, MadeBy
from fxfusion.planning.budget import Budget, Limits, Measured
from fxfusion.planning.latency import merged, predicted_latency
from fxfusion.planning.make_plan import quality_record
from fxfusion.planning.roads.choose import RoadArguments, RoadOptions, choose, road_options, search_for
from fxfusion.planning.roads.search import RoadSearch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fxfusion.cli.plan import Wish


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan with who made it, and where it came from."""

    plan: FusionPlan
    found: Measured
    search: RoadSearch
    options: RoadOptions
    budget: Budget

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        search, judge = self.search, self.search.judge
        quality = {"intact model": judge.quality(FusionPlan()), "the plan": judge.quality(self.plan)}
        if search.refitted is not None:
            quality["the plan, refitted"] = self.found.quality
        return {
            "plan": self.plan.to_dict(),
            "depth": {"intact": judge.ffns, "plan": judge.ffns - merged(self.plan)},
            "latency_ms": self._latency(),
            "quality": {name: each.to_dict() for name, each in quality.items()},
            "windows_measured": len(search.screen.costs),
            "plans_judged": len(search.found),
        }

    def _latency(self) -> dict[str, Any] | None:
        """As the cost model predicts it, where hardware is named."""
        options = self.options
        if options.hardware is None:
            return None
        price = predicted_latency(self.search.judge, options.hardware, options.tp, options.precision)
        words = f"{options.hardware}, tp {options.tp}, {options.precision}"
        return {"hardware": words, "intact": price.of(FusionPlan()), "plan": price.of(self.plan)}


def choose_plan(run: Session, wish: Wish, batches: Sequence[Tensor]) -> Chosen:
    """Look for the plan, with progress; what is measured is kept."""
    budget = Budget(
        drop=wish.drop,
        max_perplexity_increase=wish.max_perplexity_increase,
        max_kl=wish.max_kl,
        target_depth=wish.target_depth,
    )
    limits = Limits(
        max_members=wish.max_members,
        max_width=wish.max_width,
        max_bytes=wish.max_bytes,
        max_dependency=wish.max_dependency,
    )
    given = {name: getattr(wish, name) for name in RoadArguments.__annotations__}
    options, budget = road_options(cast(RoadArguments, given), budget, wish.preset == "automatic")
    run.screen.note("(choosing: the loss of windows, of whole plans, after their refit; Ctrl-C keeps what is measured)")
    search = search_for(run.model, batches, options, budget, limits, wish.norm, run.folder.path, progress=True)
    found = choose(search, options, budget)
    made_by = MadeBy.now(command=shlex.join(["fxfusion", *sys.argv[1:]]), seed=run.common.seed)
    recorded = {"model": facts_of(run.model), "quality": quality_record(found.quality), "made_by": made_by}
    return Chosen(found.plan.replace(**recorded), found, search, options, budget)


def make(run: Session, wish: Wish, target: Path) -> dict[str, Any]:
    """Make the plan, keep it, print it; what `--json` prints."""
    from fxfusion.cli.planning import what_becomes

    chosen = choose_plan(run, wish, run.batches)
    for path in dict.fromkeys((target, run.folder.file(PLAN))):
        chosen.plan.save(path, overwrite=run.common.overwrite)
    with run.screen.busy("measuring the plan"):
        result = {**chosen.to_dict(), "file": str(target), "text": run.text_facts}
        run.folder.write(COMPILED, what_becomes(chosen.search.judge, chosen.plan).to_dict())
    show(run, result)
    names = (run.common.model_dir, result["file"])
    folder, file = (shlex.quote(str(path)) for path in names)
    run.screen.line(f"\nwritten: {result['file']}; next:")
    verb = "refit" if chosen.search.refitted is not None else "fuse"
    text = " --text CALIBRATION_TEXT" if verb == "refit" else ""
    run.screen.line(f"  fxfusion {verb} {folder} OUT_DIR --plan {file}{text}")
    return result


def show(run: Session, result: dict[str, Any]) -> None:
    """The windows, what they save, and what they cost."""
    line, plan = run.screen.line, FusionPlan.resolve(result["plan"])
    if plan.groups:
        rows = [(show_members(group), group.mixers if group.is_window else "-", len(group)) for group in plan.groups]
        run.screen.table(("layers that become one", "attention between them", "FFNs"), rows)
    else:
        line("nothing is fused: no window of layers is within the budget")
    if plan.dropped_attention:
        line(f"attention dropped: layers {show_layers(plan.dropped_attention)}")
    line(f"FFNs one behind the other: {result['depth']['intact']} -> {result['depth']['plan']}")
    latency = result["latency_ms"]
    if latency is not None:
        gain = latency["intact"] / latency["plan"]
        milliseconds = f"{latency['intact']:.4g} -> {latency['plan']:.4g} ms ({gain:.3f}x)"
        line(f"predicted latency of a token on {latency['hardware']}: {milliseconds}")
    line("")
    evaluation_tables.quality(result["quality"], run.screen)
