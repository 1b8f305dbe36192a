"""Sections of docs/performance.md: groups with norms on the members' outputs, and windows of layers."""

from __future__ import annotations

from collections.abc import Sequence

from bench.performance_words import columns, gain, left_out, where
from bench.record import Record
from bench.tables import ratio_table
from bench.timing import Interval


def grouped() -> str:
    """Chains whose members have a norm on their output."""
    record = Record.read("grouped_speed")
    found = record.measurements
    gains = [one.ratios["unfused/fused"] for one in found]
    return f"""
## Norms on the FFN's output

{where(record)}

Only gate and up become one matrix here; each member keeps its own down projection and norm (`form: grouped`). Over
{len(found)} cells of a chain of 8 the fused one is {gain(one.value for one in gains)} as fast as the unfused one; by
the intervals it is {judged(gains)}.

{ratio_table(found, columns(found), markdown=True)}
"""


def windows() -> str:
    """Models that keep all their attention."""
    record = Record.read("window_speed")
    found = record.measurements
    lines = []
    for name in dict.fromkeys(name for one in found for name in one.ratios):
        slow, _, fast = name.partition("/")
        if "again" not in fast:
            gains = [one.ratios[name] for one in found if name in one.ratios]
            mean = gain(one.value for one in gains)
            lines.append(f"* {slow} / {fast}: {mean} over {len(gains)} cases, {judged(gains)}")
    told = "\n".join(lines)
    return f"""
## Windows: models that keep their attention

{where(record)} {left_out(record)}

A decoder of 8 layers with random weights, whose layers are windows of 2 or of 4. *hoist*: the attentions of a window
one after another, then its FFNs as one. *wide*: its attentions read one stream too, with one projection in and one out.
Both change what the model computes; what that costs in quality is in [results.md](results.md). In short, by the
intervals:

{told}

{ratio_table(found, columns(found), markdown=True)}
"""


def judged(gains: Sequence[Interval]) -> str:
    """How many are faster and slower, by their intervals."""
    better, worse = (sum(test(one) for one in gains) for test in (lambda one: one.low > 1, lambda one: one.high < 1))
    return f"faster in {better}, slower in {worse}, and neither in {len(gains) - better - worse}"
