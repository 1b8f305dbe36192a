"""Which layers of a model have attention, and how wide their FFNs are, read off its graph. Imported when it is used."""

from __future__ import annotations

from typing import Any

from fxfusion.analysis.planned import analyse_without
from fxfusion.graph.provenance import layer_numbers
from fxfusion.models.traced import TracedGraph


def describe(graph: TracedGraph) -> list[dict[str, Any]]:
    """All layers. `width`: of the FFN, 0 where there is none that could be fused."""
    found = analyse_without(graph, ())
    widths: dict[int, int] = {}
    numbers = layer_numbers([ffn.layer for ffn in found.matches.ffns])
    for number, ffn in zip(numbers, found.matches.ffns, strict=True):
        if number is not None:
            widths[number] = widths.get(number, 0) + ffn.width
    mixers = {block.layer for block in graph.blocks.mixers}
    count = 1 + max(block.layer for block in graph.blocks.layers)
    return [
        {"number": number, "has_mixer": number in mixers, "width": widths.get(number, 0)} for number in range(count)
    ]
