"""Alternatives of size and cut, what of them fits, and what cannot be had."""

from __future__ import annotations

import json
import math

from fxfusion.cost import Hardware, Workload, arrange, placements
from fxfusion.cost.cuts import fusable_runs, fused
from fxfusion.cost.published import published_step
from fxfusion.plan.policy import FusionPolicy
from tests.fxfusion.cost.test_sublayers import table

H100 = Hardware.of("h100")


def test_the_published_run_in_16_bits_on_80_gb() -> None:
    """What memory leaves free cuts the 49 FFNs much like the paper did (8, 12, 15, 14), not exactly so."""
    found = placements(published_step("253B before fusion"), Workload(precision="bf16"), H100, price=2.0)
    assert {row.simulation.work.tp for row in found.rows} == {1, 2, 4, 8} and not found.refused
    at_8 = {row.cut: row for row in found.rows if row.simulation.work.tp == 8}
    assert at_8["memory, from the left"].groups == (6, 8, 11, 17, 13)
    assert at_8["memory, even"].groups[0] == 6 and sum(at_8["memory, even"].groups) == 6 + 49
    assert at_8["memory, even"].making < at_8["memory, from the left"].making
    whole = at_8["whole runs"]
    assert whole.groups == (6, 49) and whole.fits and not whole.can_fuse
    assert found.quickest is not None and found.quickest.can_fuse
    assert found.quickest.simulation.work.tp == 8 and found.quickest.cut.startswith("memory")
    fewest = min(row.simulation.all_reduces for row in found.rows if row.simulation.work.tp == 8 and row.can_fuse)
    assert at_8["memory, even"].simulation.all_reduces == fewest
    assert not any(row.fits for row in found.rows if row.simulation.work.tp < 8)


def test_with_room_there_is_one_group() -> None:
    found = placements(published_step("253B before fusion"), Workload(precision="fp8"), H100, sizes=[8])
    assert [row.cut for row in found.rows] == ["not fused", "even, 4 a run", "even, 2 a run", "whole runs"]
    assert found.quickest is found.rows[-1]


def test_groups_that_are_named_count_while_they_are_made() -> None:
    """The same 49 FFNs named beforehand need the same room as when the table of cuts proposes them."""
    before = published_step("253B before fusion")
    free = placements(before, Workload(precision="bf16"), H100, sizes=[8])
    runs = fusable_runs(before, FusionPolicy.resolve("paper"))
    given = placements(fused(before, [(run,) for run in runs]), Workload(precision="bf16"), H100, sizes=[8])
    assert given.rows[0].cut == "as given" and given.rows[0].groups == (6, 49) and not given.rows[0].can_fuse
    whole = next(row for row in free.rows if row.cut == "whole runs")
    assert math.isclose(given.rows[0].making, whole.making, rel_tol=1e-4)  # the norms of the members are one's


def test_what_is_not_possible_is_said() -> None:
    step = arrange(table("A30 30 30 30", num_key_value_heads=8))
    found = placements(step, Workload(), H100, policy="maximal")
    assert found.refused[4] == "the FFN of layer 0 has 30 channels, which tp 4 does not divide"
    assert {row.simulation.work.tp for row in found.rows} == {1, 2}
    alone = placements(step, Workload(), Hardware.of("cpu"), policy="maximal")
    assert {row.simulation.work.tp for row in alone.rows} == {1}
    tiny = placements(step, Workload(), H100.model_copy(update={"memory": 10.0}), sizes=[1])
    assert tiny.quickest is None and tiny.to_dict()["quickest"] is None


def test_a_model_without_runs_has_one_row_a_size() -> None:
    found = placements(arrange(table("A8 A8")), Workload(), H100, sizes=[1, 2])
    assert [(row.simulation.work.tp, row.cut, row.groups) for row in found.rows] == [
        (1, "not fused", ()),
        (2, "not fused", ()),
    ]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
