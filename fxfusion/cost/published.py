"""What was published about the speed of these models, to hold predictions against.

Source: arXiv 2503.18908, table 2 and its caption in version 1: one user, eight H100 with tensor parallelism, FP8. How
many tokens were in the cache is not stated.
"""

from __future__ import annotations

from fxfusion.cost.layer_table import LayerTable
from fxfusion.cost.sublayers import Step, arrange

# Tokens per second of one user.
LATENCIES = {"405B": 41.44, "253B before fusion": 63.38, "253B": 70.92, "70B": 94.03}
RATIOS = (("253B before fusion", "405B"), ("253B", "253B before fusion"), ("253B", "405B"))
TABLES = {"405B": "llama-3.1-405b", "253B": "nemotron-ultra-253b", "70B": "llama-3.3-70b"}
# Members of the four fused FFNs, by slot.
MEMBERS = {125: 8, 134: 12, 143: 15, 149: 14}


def published_step(name: str) -> Step:
    """The sublayers of one of `LATENCIES`."""
    before = name == "253B before fusion"
    table = LayerTable.published(TABLES["253B" if before else name])
    return arrange(table, unfuse=MEMBERS if before else None)
