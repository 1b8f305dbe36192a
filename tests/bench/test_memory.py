"""What the backend keeps beyond the model: the groups' weights once, however many graphs are compiled."""

from __future__ import annotations

import pytest

from bench.memory import measure_route


@pytest.mark.slow
def test_the_backend_keeps_the_groups_weights_once() -> None:
    found = measure_route("backend")
    groups = float(found.facts["group_bytes"] or 0)
    peak, after, recompiled = (found.medians[name].value for name in ("peak", "after", "recompiled"))
    widest = groups / 6  # two groups of three wide weights
    assert 0.95 * groups < after < 1.05 * groups
    assert peak < groups + 2.5 * widest, "the last weight, joined, as oneDNN's tensor, and in its layout"
    assert recompiled - after < 0.1 * groups
