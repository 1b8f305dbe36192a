"""The arena: fxfusion's plans and what others do, at equal FFN depth, on the same text, by the same measures.

    methods x depths    an entrant each: a plan, or a change of the graph     chosen on one part of the text
    cells               each entrant as it is, and after `refit`              measured on the other part
    comparison          a table, CSV, a plot

The rivals' rules are in `fxfusion.analysis.rivals`. All read the same calibration text, and none is tuned on what
judges. Attention that is dropped leaves the FFN depth as it is: `llm-drop` drops so much of it that its predicted
latency is no more than that of `pairs` at the depth.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import Batch, text_key
from fxfusion.analysis.generation import greedy_agreement
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.planned import PlannedModel
from fxfusion.analysis.probes import ProbeScores, probe
from fxfusion.analysis.quality import evaluate
from fxfusion.analysis.rivals import EditedModel, fit_linear_map, flattest_run, pairs_from, run_distances
from fxfusion.analysis.score_runs import Unit
from fxfusion.analysis.scores import AttentionScores, Method, attention_scores
from fxfusion.analysis.store import Store, inside
from fxfusion.cost import Hardware, LayerTable, Workload, arrange, simulate_step
from fxfusion.errors import NotFusedError, OptionError, PlanError, SurgeryError
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.budget import Budget
from fxfusion.planning.choice import Search
from fxfusion.planning.comparison import Cell, Comparison, Entrant
from fxfusion.planning.make_plan import search_for
from fxfusion.planning.price import merged, predicted_latency, table_of_model
from fxfusion.planning.request import Request
from fxfusion.planning.roads import ROADS
from fxfusion.planning.scores import JUDGED, first, increase, screened
from fxfusion.recovery.refit import refit as refitted
from fxfusion.report.progress import each, reporting

RIVALS = ("pairs", "shortgpt", "sleb", "llm-drop", "ffn-drop", "replaceme")
METHODS = (*ROADS, "mixed", *RIVALS)
_JUDGES = 4  # one batch in so many judges
_PROMPT = 32  # tokens of each prompt
_CANNOT = (PlanError, NotFusedError, SurgeryError, OptionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaOptions:
    """What `compare` was asked, checked. Raises `OptionError`."""

    depths: tuple[int, ...]
    methods: tuple[str, ...] = METHODS
    refit: bool = False
    probes: int = 0
    generate: int = 0
    new_tokens: int = 32
    max_window: int | None = None
    hardware: str | os.PathLike[str] | Hardware = "h100"
    tp: int = 1
    precision: str = "bf16"

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            named = repr(unknown[0]) if unknown else "none"
            raise OptionError(f"methods: expected some of {', '.join(METHODS)}, got {named}")
        if not self.depths or len(set(self.depths)) < len(self.depths):
            raise OptionError(f"depths: expected different numbers of FFNs, got {list(self.depths)}")
        for name in ("probes", "generate"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name}: expected a number from 0 on, got {getattr(self, name)}")
        Hardware.of(self.hardware)

    def check_depths(self, ffns: int) -> None:
        """Raises `OptionError` for a depth that a model with so many FFNs cannot be brought to."""
        for depth in self.depths:
            if not 1 <= depth < ffns:
                raise OptionError(f"depths: {depth} is not between 1 and {ffns - 1}: the model has {ffns} FFNs")

    def check_device(self, table: LayerTable) -> None:
        """Raises `OptionError` where nothing can be predicted of a model with these layers."""
        simulate_step(arrange(table), Workload(tp=self.tp, precision=self.precision), Hardware.of(self.hardware))


def compare(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    depths: Sequence[int],
    methods: Sequence[str] = METHODS,
    refit: bool = False,
    probes: int = 0,
    generate: int = 0,
    new_tokens: int = 32,
    tokenizer: Any = None,
    max_window: int | None = None,
    hardware: str | os.PathLike[str] | Hardware = "h100",
    tp: int = 1,
    precision: str = "bf16",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Measure fxfusion's plans and those of other methods at the same FFN depths. The model is not changed.

    Args:
        model: a causal language model that is captured as one graph.
        batches: text; the last quarter of the batches judges, everything is chosen and fitted on the others.
        depths: FFNs that are computed one after another, each below those of the model.
        methods: of `METHODS`: the planner's roads, "mixed" (all of them), and the rivals of `analysis.rivals`.
        refit: also measure each plan after `fxfusion.refit` towards the intact model.
        probes: so many generative probes of each kind (needs `tokenizer`). generate: so many prompts that are continued
            greedily by `new_tokens`, and compared with the intact model's text.
        max_window: as of `make_plan`. hardware, tp, precision: what latency is predicted for.
        cache: a folder: what is in it is not measured again.
        progress: say how far it is, on the error stream.

    Raises:
        OptionError: options that cannot be; fewer than two batches; a cache of another model or text.
        CaptureError: the model cannot be captured as one graph.
    """
    asked = ArenaOptions(
        depths=tuple(depths),
        methods=tuple(methods),
        refit=refit,
        probes=probes,
        generate=generate,
        new_tokens=new_tokens,
        max_window=max_window,
        hardware=hardware,
        tp=tp,
        precision=precision,
    )
    if probes and tokenizer is None:
        raise OptionError("probes: they are texts, so they need a tokenizer")
    return Arena(model, list(batches), asked, tokenizer, cache, progress).run()


def divided(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What to choose and fit on, and what to judge by. Raises `OptionError` where there are fewer than two batches."""
    if len(batches) < 2:
        raise OptionError("a comparison needs two batches of text at least: one to choose on, one to judge by")
    judges = max(1, len(batches) // _JUDGES)
    return list(batches[:-judges]), list(batches[-judges:])


class Arena:
    """One comparison. Everything that methods share is made once, when it is first asked for."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        asked: ArenaOptions,
        tokenizer: Any = None,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> None:
        self.fitted, self.judged = divided(batches)
        self.asked, self.tokenizer, self.folder, self.progress = asked, tokenizer, folder, progress
        self.traced = TracedModel(model)
        self.meter = PlanMeter(self.traced, self.judged)
        asked.check_depths(self.meter.ffns)
        asked.check_device(self._table)
        facts = {"fitted": text_key(self.fitted)}
        path = inside(folder, "comparison.json")
        self.store = Store(path, "a comparison", lambda: self.meter.facts() | facts)
        self._searches: dict[tuple[str, ...], Search] = {}
        self._problems: dict[tuple[str, int], Exception] = {}

    def run(self) -> Comparison:
        """All cells, in order. One that cannot be had says why."""
        self._choose_all()
        cells: list[Cell] = []
        total = len(self.asked.depths) * len(self.asked.methods) * (2 if self.asked.refit else 1)
        with reporting(self.progress, "comparison", total) as advance:
            for depth in sorted(self.asked.depths, reverse=True):
                for method in self.asked.methods:
                    for repaired in (False, True) if self.asked.refit else (False,):
                        cell = self.cell(method, depth, repaired)
                        cells += [] if cell is None else [cell]
                        advance(1, f"depth {depth}, {method}")
        return Comparison(
            cells=tuple(cells),
            ffns=self.meter.ffns,
            latency_ms=self.latency(Entrant("intact", FusionPlan())),
            predicted_for=f"{Hardware.of(self.asked.hardware).name}, tp {self.asked.tp}, {self.asked.precision}",
            tokens=(_tokens(self.fitted), _tokens(self.judged)),
        )

    def _choose_all(self) -> None:
        """Method by method: each search finds what those before it measured."""
        depths = sorted(self.asked.depths, reverse=True)
        with reporting(self.progress, "choosing", len(depths) * len(self.asked.methods)) as advance:
            for method in self.asked.methods:
                for depth in depths:
                    try:
                        self.entrant(method, depth)
                    except _CANNOT as error:
                        self._problems[method, depth] = error
                    advance(1, f"{method}, depth {depth}")
                self._searches.clear()

    def cell(self, method: str, depth: int, repaired: bool) -> Cell | None:
        """None where a refit has nothing to refit."""
        try:
            entrant = self.entrant(method, depth)
            if repaired and not entrant.can_be_refitted:
                return None
            found = self._known(f"{method} {depth} {'refitted' if repaired else 'raw'}", entrant, repaired)
        except _CANNOT as error:
            return Cell(method=method, depth=depth, repaired=repaired, problem=f"{error}")
        return Cell(
            method=method,
            depth=depth,
            repaired=repaired,
            entrant=entrant,
            ffns=self.meter.ffns - merged(entrant.plan) - len(entrant.ffns),
            latency_ms=self.latency(entrant),
            **found,
        )

    # --- entrants -------------------------------------------------------------------------------------

    def entrant(self, method: str, depth: int) -> Entrant:
        """What a method makes of the model at a depth; kept. Raises `PlanError` where it cannot get there."""
        if (method, depth) in self._problems:
            raise self._problems[method, depth]
        known = self.store.data.setdefault("entrants", {})
        key = f"{method} {depth}"
        if self.asked.max_window is not None and method not in RIVALS:
            key += f" max_window {self.asked.max_window}"
        if method == "llm-drop":  # it depends on the device
            key += f" {self._work()}"
        if key not in known:
            known[key] = self._chosen(method, self.meter.ffns - depth).to_dict()
            self.store.save()
        return Entrant.from_dict(known[key])

    def _chosen(self, method: str, fewer: int) -> Entrant:
        rivals: dict[str, Callable[[int], Entrant]] = {
            "pairs": self._pairs,
            "shortgpt": lambda count: self._removed("shortgpt", self._scores("block", "cosine").ranking[:count]),
            "sleb": lambda count: self._removed("sleb", self._scores("block", "loss", count).order),
            "llm-drop": self._dropped,
            "ffn-drop": self._without_ffns,
            "replaceme": self._replaced,
        }
        if method in rivals:
            return rivals[method](fewer)
        roads = tuple(ROADS) if method == "mixed" else (method,)
        if roads not in self._searches:
            asked = Request(roads=roads, budget=Budget(target_depth=1), max_window=self.asked.max_window)
            self._searches[roads] = search_for(
                self.traced.model,
                first(self.fitted, JUDGED),
                asked,
                cache=inside(self.folder, "planner"),
                progress=self.progress,
            )
        found = self._searches[roads].choose(Budget(target_depth=self.meter.ffns - fewer))
        return Entrant(method, found.plan)

    def _scores(self, unit: Unit, method: Method, drop: int | None = None) -> AttentionScores:
        return attention_scores(
            self.traced,
            screened(self.fitted) if drop is not None else self.fitted,
            method,
            unit=unit,
            greedy=drop is not None,
            drop=drop,
            cache=inside(self.folder, "scores_greedy.json" if drop is not None else "scores.json"),
            progress=self.progress,
        )

    def _removed(self, method: str, layers: Iterable[int]) -> Entrant:
        return Entrant(method, FusionPlan(removed=sorted(layers)))

    def _pairs(self, count: int) -> Entrant:
        layers = self.meter.layers
        if 2 * count > layers:
            raise PlanError(f"{count} pairs need {2 * count} layers, the model has {layers}")
        few = PlanMeter(self.traced, screened(self.fitted), inside(self.folder, "pairs"))
        plans = [pairs_from(first, count) for first in range(layers - 2 * count + 1)]
        losses = [increase(few, plan) for plan in each(plans, self.progress, f"runs of {count} pairs")]
        return Entrant("pairs", plans[min(range(len(plans)), key=losses.__getitem__)])

    def _dropped(self, fewer: int) -> Entrant:
        bound = self.latency(Entrant("pairs", pairs_from(0, min(fewer, self.meter.layers // 2))))
        ranking = self._scores("attention", "cosine").ranking
        for count in range(1, len(ranking) + 1):
            found = Entrant("llm-drop", FusionPlan(dropped_attention=sorted(ranking[:count])))
            if self.latency(found) <= bound:
                return found
        raise PlanError(f"without any attention the model is predicted to take more than the {bound:.4g} ms of pairs")

    def _without_ffns(self, count: int) -> Entrant:
        return Entrant("ffn-drop", FusionPlan(), tuple(sorted(self._scores("ffn", "cosine").ranking[:count])))

    def _replaced(self, count: int) -> Entrant:
        first = flattest_run(self._distances, count)
        return Entrant("replaceme", FusionPlan(removed=range(first, first + count)), mapped=True)

    @cached_property
    def _distances(self) -> Tensor:
        return run_distances(self.traced, self.fitted, self.progress)

    # --- what is measured -----------------------------------------------------------------------------

    def _known(self, key: str, entrant: Entrant, repaired: bool) -> dict[str, Any]:
        """Quality, probes and agreement of an entrant, each measured once. `key`: of the cell."""
        asked, told = self.asked, entrant.to_dict()
        model = cache(lambda: self.model_of(entrant, repaired))
        quality = self._keep(f"{key} quality", told, lambda: self._quality(model()))
        solved = agreement = None
        if asked.probes:
            solved = self._kept(self._keep(f"{key} probes {asked.probes}", told, lambda: self._probed(model())))
        if asked.generate:
            what = f"{key} agreement {asked.generate} {asked.new_tokens}"
            agreement = self._keep(what, told, lambda: self._agreement(model()))
        return {"quality": quality, "probes": solved, "agreement": agreement}

    def _keep(self, key: str, of: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What was measured of this before, or what `make` measures now."""
        known = self.store.data.setdefault("measured", {})
        if key not in known or known[key]["of"] != of:
            known[key] = {"of": of, "value": make()}
            self.store.save()
        return known[key]["value"]

    def model_of(self, entrant: Entrant, repaired: bool = False) -> Any:
        """Something to call with token ids."""
        plan = entrant.plan
        if repaired:
            return refitted(self.traced.model, plan, self.fitted, reference="intact", progress=self.progress)
        if entrant.mapped:
            found = fit_linear_map(self.traced, self.fitted, plan.removed[0], len(plan.removed), self.progress)
            return EditedModel(self.traced, plan.removed, mapped=(found.first - 1, found.matrix))
        return EditedModel(self.traced, ffns=entrant.ffns) if entrant.ffns else PlannedModel(self.traced, plan)

    def _quality(self, model: Any) -> dict[str, Any]:
        return evaluate(model, self.judged, self.meter.intact()).to_dict()

    def _probed(self, model: Any) -> dict[str, Any]:
        return probe(model, self.tokenizer, per_kind=self.asked.probes).to_dict()

    def _agreement(self, model: Any) -> float:
        starts = torch.cat([_ids(batch) for batch in self.judged])[: self.asked.generate, :_PROMPT]
        text = greedy_agreement(model, self._intact, [starts], self.asked.new_tokens, eos_token_id=[], samples=0)
        return text.share.value

    @cached_property
    def _intact(self) -> PlannedModel:
        return PlannedModel(self.traced, FusionPlan())

    def _kept(self, scores: dict[str, Any]) -> dict[str, float | None]:
        """Of what the intact model solves."""
        intact = self._keep(f"intact probes {self.asked.probes}", {}, lambda: self._probed(self._intact))
        return ProbeScores.from_dict(scores).kept(ProbeScores.from_dict(intact))

    def latency(self, entrant: Entrant) -> float:
        """Predicted milliseconds for one decoded token."""
        table = self._table
        if entrant.ffns:
            without = {at: one.model_copy(update={"ffn_width": None}) for at, one in enumerate(table.layers)}
            layers = [without[at] if at in entrant.ffns else one for at, one in enumerate(table.layers)]
            table = table.model_copy(update={"layers": tuple(layers)})
        asked = self.asked
        return predicted_latency(self.meter, asked.hardware, asked.tp, asked.precision, table).of(entrant.plan)

    @cached_property
    def _table(self) -> LayerTable:
        return table_of_model(self.traced.model, self.meter.graph)

    def _work(self) -> str:
        return f"{Hardware.of(self.asked.hardware).name} {self.asked.tp} {self.asked.precision}"


def _ids(batch: Batch) -> Tensor:
    found: Tensor = batch if isinstance(batch, Tensor) else batch["input_ids"]
    return found


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(_ids(batch).numel() for batch in batches)
