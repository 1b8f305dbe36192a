"""What is to be low: the FFN depth, or the latency that the cost model predicts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.planned import analyse_without
from fxfusion.cost import Hardware, Layer, LayerTable, Workload, arrange, simulate_step
from fxfusion.cost.read_table import sizes_of_config, width_of_config, windows_of_config
from fxfusion.errors import OptionError
from fxfusion.graph.provenance import layer_numbers
from fxfusion.models.traced import TracedGraph
from fxfusion.passes.ffn import FfnNode
from fxfusion.plan.fusion_plan import FusionPlan


def table_of_model(model: nn.Module, graph: TracedGraph) -> LayerTable:
    """The layers of a captured model: which have a mixer, how wide their FFNs are, by structure.

    Heads, vocabulary, and the width of FFNs that are no node of a chain (beside their attention, say) come from the
    config. Raises `OptionError` where that does not say it.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise OptionError(f"{name} has no config: how many heads its attention has is not known")
    fields, where = config.to_dict(), f"the config of {name}"
    found = analyse_without(graph, ()).matches.ffns
    mixers, there = ({block.layer for block in blocks} for blocks in (graph.blocks.mixers, graph.blocks.layers))
    widths = dict.fromkeys(there, width_of_config(fields, where)) | _widths(found)
    unknown = [number for number in sorted(there) if widths[number] is None]
    if unknown or not found:
        raise OptionError(
            f"{name}: the FFN of layer {(unknown or [0])[0]} is not understood, and no config says its width"
        )
    windows = windows_of_config(fields.get("text_config") or fields, 1 + max(there))
    layers = [
        Layer(attention=number in mixers, ffn_width=widths.get(number), window=window if number in mixers else None)
        for number, window in enumerate(windows)
    ]
    gated = any(len(ffn.pieces) > 1 for ffn in found)
    return LayerTable(name=name, gated=gated, blocks=tuple(layers), **sizes_of_config(fields, where))


def _widths(ffns: Sequence[FfnNode]) -> dict[int, int]:
    """Channels by layer."""
    widths: dict[int, int] = {}
    for number, ffn in zip(layer_numbers([ffn.layer for ffn in ffns]), ffns, strict=True):
        if number is not None:
            widths[number] = widths.get(number, 0) + ffn.width
    return widths


@dataclass(frozen=True, slots=True)
class Price:
    """What is to be low. `of(plan)`: its price, `text(price)`: in words. `by_depth`: it counts FFNs, so it needs no
    hardware."""

    of: Callable[[FusionPlan], float]
    text: Callable[[float], str]
    by_depth: bool


def depth_price(ffns: int) -> Price:
    """FFNs that remain of so many."""
    return Price(of=lambda plan: float(ffns - merged(plan)), text=lambda price: f"{price:.0f} FFNs", by_depth=True)


def latency_price(latency: Callable[[FusionPlan], float]) -> Price:
    """Predicted milliseconds for one step."""
    return Price(of=latency, text=lambda price: f"{price:.4g} ms", by_depth=False)


def merged(plan: FusionPlan) -> int:
    """How much the FFN depth falls."""
    return len(plan.removed) + sum(len(group) - 1 for group in plan.groups)


def predicted_latency(
    meter: PlanMeter,
    hardware: str | os.PathLike[str] | Hardware,
    tp: int = 1,
    precision: str = "bf16",
    table: LayerTable | None = None,
    *,
    workload: Workload | None = None,
) -> Price:
    """What gives plans for the meter's model their latency, by the cost model. `table`: of another size with as many
    layers. `workload`: instead of one token, decoded after 1,024.

    Raises `OptionError` for hardware that is not known, sizes that are not, or heads that `tp` does not divide.
    """
    layers = table_of_model(meter.traced.model, meter.graph) if table is None else table
    device, work = Hardware.of(hardware), workload or Workload(tp=tp, precision=precision)
    known: dict[Any, float] = {}

    def latency(plan: FusionPlan) -> float:
        key = (plan.groups, plan.dropped_attention, plan.removed)
        if key not in known:
            known[key] = simulate_step(arrange(layers, plan), work, device).latency_ms
        return known[key]

    latency(FusionPlan())  # what cannot be predicted is said before anything is measured
    return latency_price(latency)
