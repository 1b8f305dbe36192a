"""What a model costs to run, by arithmetic alone: latency, memory, price. No weights, no device.

    from fxfusion import cost

    fused = cost.simulate("nemotron-ultra-253b", hardware="h100", tp=8, precision="fp8")
    fused.tokens_per_second, fused.latency_ms, fused.bytes_per_gpu, fused.all_reduces

How it counts, what was fitted, and how far it is off: docs/cost.md.
"""

from __future__ import annotations

from fxfusion.cost.calibrate import calibrate
from fxfusion.cost.gain import Gains, gains
from fxfusion.cost.hardware import Hardware, Link, known_hardware
from fxfusion.cost.kernels import Workload
from fxfusion.cost.layer_table import Layer, LayerTable, published_tables
from fxfusion.cost.placement import Placement, Placements, placements
from fxfusion.cost.read_table import read_table
from fxfusion.cost.simulate import Simulation, simulate, simulate_step
from fxfusion.cost.sublayers import Attention, Ffn, Step, arrange

__all__ = [
    "Attention",
    "Ffn",
    "Gains",
    "Hardware",
    "Layer",
    "LayerTable",
    "Link",
    "Placement",
    "Placements",
    "Simulation",
    "Step",
    "Workload",
    "arrange",
    "calibrate",
    "gains",
    "known_hardware",
    "placements",
    "published_tables",
    "read_table",
    "simulate",
    "simulate_step",
]
