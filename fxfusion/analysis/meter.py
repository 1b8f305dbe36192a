"""Measures plans on one text against the intact model, and remembers what it measured.

One capture and one run of the intact model serve all plans; with a cache folder, one run serves all processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxfusion.analysis.batches import require_causal, text_key
from fxfusion.analysis.planned import PlannedModel, analyse_without
from fxfusion.analysis.quality import Batch, Estimate, Quality, evaluate, record_logits
from fxfusion.analysis.store import Store, inside, model_key
from fxfusion.errors import SurgeryError
from fxfusion.graph.provenance import layer_numbers
from fxfusion.models.adapters.wrappers import active_adapters
from fxfusion.models.fingerprint import facts_of
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.passes.choose_form import member_bytes
from fxfusion.plan.fusion_plan import FusionPlan, Member

_RECORDED_BYTES = 2**29  # logits of the intact model that are kept rather than computed again for each plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainFacts:
    """FFNs in a row without a mixer in between. `widths` [intermediate channels], `bytes` of weights, by member.

    `leading`: whether the first member sits in the layer whose mixer wrote the chain's input.
    """

    members: tuple[Member, ...]
    widths: tuple[int, ...]
    bytes: tuple[int, ...]
    leading: bool


class Qualities:
    """Measured qualities by a key, in memory and in a file. `facts`: what they were measured of."""

    def __init__(self, path: Path | None, facts: Callable[[], dict[str, Any]]) -> None:
        self._store = Store(path, "measured qualities", facts)
        self._known: dict[str, dict[str, Any]] = self._store.data.setdefault("plans", {})
        if not isinstance(self._known, dict):
            raise self._store.broken("plans is no object")

    def get(self, key: str) -> Quality | None:
        """Raises `OptionError` where the file has something else there."""
        found = self._known.get(key)
        if found is None:
            return None
        try:
            parts: dict[str, Any] = {
                name: Estimate(**value) if isinstance(value, dict) else value for name, value in found.items()
            }
            return Quality(**parts)
        except (TypeError, AttributeError) as error:
            raise self._store.broken(f"{key}: {error}") from error

    def of(self, key: str, measure: Callable[[], Quality]) -> Quality:
        """What is known, else what is measured now, and kept."""
        known = self.get(key)
        if known is None:
            known = measure()
            self._known[key] = asdict(known)
            self._store.save()
        return known


class PlanMeter:
    """Quality of plans for one model on the same batches.

    `model`: one that is traced already shares its graphs. `cache`: a folder; results are written after each
    measurement and found again by the next process. Raises `OptionError` where the folder holds results of another
    model or text, `PlanError` where the model has no decoder layers.
    """

    def __init__(
        self,
        model: nn.Module | TracedModel,
        batches: Sequence[Batch],
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model.model if isinstance(model, TracedModel) else model
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty: nothing to measure plans on")
        self.traced = model if isinstance(model, TracedModel) else TracedModel(model)
        self.layers = facts_of(self.model, values=False).layers  # refuses a model without decoder layers
        self.known = Qualities(inside(cache, "plans.json"), self.facts)
        self._chains: dict[tuple[int, ...], tuple[ChainFacts, ...]] = {}
        self._members: dict[Member, tuple[int, int]] | None = None
        self._reference: Any = None

    def facts(self) -> dict[str, Any]:
        """What tells its measurements from others. Reads every weight."""
        return {"model": model_key(self.traced), "text": text_key(self.batches)}

    @property
    def graph(self) -> TracedGraph:
        """The intact model's graph, for batches like the first."""
        return self.traced.graph(self.batches[0])

    @property
    def mixers(self) -> tuple[int, ...]:
        """Layers that have attention (or another mixer)."""
        return tuple(sorted({block.layer for block in self.graph.blocks.mixers}))

    def chains(self, dropped: Sequence[int]) -> tuple[ChainFacts, ...]:
        """The chains of two or more FFNs once the attention of some layers is gone."""
        key = tuple(sorted(dropped))
        if key not in self._chains:
            found = analyse_without(self.graph, key)
            numbers = dict(zip([ffn.add for ffn in found.matches.ffns], _members(found.matches.ffns), strict=True))
            self._chains[key] = tuple(
                ChainFacts(
                    members=tuple(numbers[ffn.add] for ffn in chain.members),
                    widths=tuple(ffn.width for ffn in chain.members),
                    bytes=tuple(member_bytes(ffn) for ffn in chain.members),
                    leading=chain.leading,
                )
                for chain in found.chains
                if len(chain.members) > 1
            )
        return self._chains[key]

    @property
    def members(self) -> Mapping[Member, tuple[int, int]]:
        """Every FFN that was matched: its width [intermediate channels] and the bytes of its weights."""
        if self._members is None:
            ffns = analyse_without(self.graph, ()).matches.ffns
            facts = [(ffn.width, member_bytes(ffn)) for ffn in ffns]
            self._members = dict(zip(_members(ffns), facts, strict=True))
        return self._members

    @property
    def ffns(self) -> int:
        """FFNs of the model, fusable or not: one for each decoder layer at least."""
        return max(len(self.graph.blocks.layers), len(self.graph.blocks.ffns))

    def refuse_hidden_ffns(self) -> None:
        """Raises `SurgeryError` where FFNs cannot be seen since adapters are active in the model."""
        adapted = active_adapters(self.model)
        if adapted and len(self.members) < self.ffns:
            raise SurgeryError(
                f"{self.ffns - len(self.members)} FFNs cannot be seen, since adapters are active ({adapted[0]}, ...): "
                "plan after `model.merge_adapter()` (then `unmerge_adapter()`), or inside of "
                "`with model.disable_adapter():`; `fuse` carries adapters as they are"
            )

    def knows(self, plan: FusionPlan) -> bool:
        """Whether it was measured before."""
        return self.known.get(plan_key(plan)) is not None

    def quality(self, plan: FusionPlan) -> Quality:
        """Loss, perplexity, and what is lost against the intact model."""
        return self._measured(plan_key(plan), plan, self.intact)

    def known_quality(self, plan: FusionPlan) -> Quality | None:
        """The same if it was measured already."""
        return self.known.get(plan_key(plan))

    def difference(self, plan: FusionPlan, other: FusionPlan) -> Estimate:
        """The loss of one plan less that of another, in nats per token, token by token on the same text.

        Its interval is far tighter than either plan's own.
        """
        key = f"{plan_key(plan)} - {plan_key(other)}"
        found = self._measured(key, plan, lambda: PlannedModel(self.traced, other)).loss_increase
        assert found is not None
        return found

    def _measured(self, key: str, plan: FusionPlan, reference: Callable[[], Any]) -> Quality:
        return self.known.of(key, lambda: evaluate(PlannedModel(self.traced, plan), self.batches, reference()))

    def intact(self) -> Any:
        """The intact model's logits where they are small enough to keep, else the model itself."""
        if self._reference is None:
            require_causal(self.traced.model, self.batches[0])
            intact = PlannedModel(self.traced, FusionPlan())  # through the same graph: a plan of nothing costs nothing
            self._reference = record_logits(intact, self.batches) if self._logit_bytes() <= _RECORDED_BYTES else intact
        return self._reference

    def _logit_bytes(self) -> int:
        value = self.graph.logits.meta.get("example_value")
        per_token = value.shape[-1] * value.element_size() if isinstance(value, Tensor) else 0
        return per_token * sum(_ids(batch).numel() for batch in self.batches)


def plan_key(plan: FusionPlan) -> str:
    """What is measured of a plan, as text."""
    parts = [sorted(plan.dropped_attention), [group.to_data() for group in plan.groups], plan.norm]
    return json.dumps([*parts, list(plan.removed)] if plan.removed else parts)


def _members(ffns: Sequence[Any]) -> list[Member]:
    """Layer numbers where they tell the FFNs apart, module paths where they do not."""
    numbers = layer_numbers([ffn.layer for ffn in ffns])
    if None in numbers or len(set(numbers)) < len(numbers):
        return [ffn.name for ffn in ffns]
    return [number for number in numbers if number is not None]


def _ids(batch: Batch) -> Tensor:
    found: Tensor = batch["input_ids"] if isinstance(batch, Mapping) else batch
    return found
