"""What a plan is predicted to take on a device: the planner's view of `fxfusion.cost`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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


def latency_of_plan(
    table: LayerTable,
    plan: FusionPlan,
    hardware: str | os.PathLike[str] | Hardware,
    workload: Workload | None = None,
) -> float:
    """Predicted latency of one step under a plan [ms]. Raises `OptionError` where the plan does not fit the table."""
    step = arrange(table, plan)
    return simulate_step(step, workload or Workload(), Hardware.of(hardware)).latency_ms


def predictor(
    meter: PlanMeter, hardware: str | os.PathLike[str] | Hardware | None, workload: Workload | None = None
) -> Callable[[FusionPlan], float] | None:
    """What gives plans for the meter's model their latency [ms]; None without hardware.

    `workload` None: decoding one sequence in 16 bits.
    """
    if hardware is None:
        if workload is not None:
            raise OptionError("workload: name the hardware that it runs on")
        return None
    device = Hardware.of(hardware)
    table = table_of_model(meter.traced.model, meter.graph)
    known: dict[Any, float] = {}

    def latency(plan: FusionPlan) -> float:
        key = (plan.groups, plan.dropped_attention)
        if key not in known:
            known[key] = latency_of_plan(table, plan, device, workload)
        return known[key]

    return latency
