"""What is to be low: how many FFNs stand one behind the other, or the latency that the cost model predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxfusion.analysis.meter import PlanMeter, plan_key
from fxfusion.cost.hardware import Hardware
from fxfusion.cost.layer_table import LayerTable
from fxfusion.cost.simulate import simulate
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.latency import table_of_model


@dataclass(frozen=True, slots=True)
class Price:
    """`of(plan)`: its price, `text(price)`: in words. `by_depth`: it counts FFNs, so it needs no hardware."""

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
    """How many FFNs fewer there are one behind the other."""
    return sum(len(group) - 1 for group in plan.groups)


def predicted_latency(
    meter: PlanMeter, hardware: str, tp: int = 1, precision: str = "bf16", table: LayerTable | None = None
) -> Price:
    """Latency of decoding one token, by the cost model. `table`: of another size with as many layers.

    Raises `OptionError` for hardware that is not known, sizes that are not, or heads that `tp` does not divide.
    """
    layers = table_of_model(meter.traced.model, meter.graph) if table is None else table
    device = Hardware.of(hardware)
    known: dict[str, float] = {}

    def latency(plan: FusionPlan) -> float:
        key = plan_key(plan)
        if key not in known:
            known[key] = simulate(layers, hardware=device, tp=tp, precision=precision, plan=plan).latency_ms
        return known[key]

    latency(FusionPlan())  # what cannot be predicted is said before anything is measured
    return latency_price(latency)
