"""price: FFNs in a row, or predicted milliseconds. (Predicted latency of real models: test_choose.)"""

from __future__ import annotations

from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.roads.price import depth_price, latency_price, merged


def test_depth_counts_the_ffns_that_remain() -> None:
    plan = FusionPlan(groups=[[1, 2, 3], {"members": [5, 6], "mixers": "hoist"}], dropped_attention=[2, 3])
    price = depth_price(8)
    assert merged(plan) == 3 and price.of(plan) == 5 and price.of(FusionPlan()) == 8
    assert price.by_depth and price.text(5.0) == "5 FFNs"


def test_latency_is_in_milliseconds() -> None:
    price = latency_price(lambda plan: 2.0 - 0.25 * merged(plan))
    assert price.of(FusionPlan(groups=[[1, 2]])) == 1.75 and price.text(1.75) == "1.75 ms" and not price.by_depth
