"""The gain of fusing over size, batch and scale."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fxfusion.cost import Hardware, Workload, arrange, gains
from fxfusion.cost.gain import BASELINES, Gains, scaled
from fxfusion.cost.published import published_step
from fxfusion.errors import OptionError
from tests.fxfusion.cost.test_sublayers import table

H100 = Hardware.of("h100")


@pytest.fixture(scope="module")
def found() -> Gains:
    before, after = published_step("253B before fusion"), published_step("253B")
    return gains(before, after, Workload(precision="fp8"), H100, batches=(1, 64, 1024), scales=(0.25, 1.0))


def test_it_pays_where_kernels_are_small(found: Gains) -> None:
    gain = {(point.scale, point.tp, point.batch): point.gain for point in found.points}
    assert len(gain) == 2 * 4 * 3 and min(gain.values()) > 1
    assert gain[1.0, 8, 1] == pytest.approx(70.92 / 63.38, rel=0.07)
    assert gain[1.0, 1, 1] < 1.02 < gain[1.0, 8, 1] < gain[0.25, 8, 1]
    assert gain[0.25, 1, 1024] < gain[0.25, 1, 1]


def test_the_better_the_baseline_the_less_fusing_gains() -> None:
    before, after = published_step("253B before fusion"), published_step("253B")
    few = {"sizes": (1, 8), "batches": (1,), "scales": (1.0,)}
    found = gains(before, after, Workload(precision="fp8"), H100, **few, baselines=BASELINES)
    gain = {(point.baseline, point.tp): point.gain for point in found.points}
    assert found.baselines == ("cuda-graph", "cuda-graph, fused-norm", "eager", "megakernel")
    assert gain["eager", 8] > gain["cuda-graph", 8] > gain["cuda-graph, fused-norm", 8] > gain["megakernel", 8] > 1.02
    assert max(gain[baseline, 1] for baseline in found.baselines) < 1.02
    assert found.little == "fusing gains under 2% in 4 of 8 settings"
    cpu = gains(before, after, Workload(), Hardware.of("cpu"), sizes=(1,), baselines=BASELINES, scales=(1.0,))
    assert cpu.baselines == ("cuda-graph", "cuda-graph, fused-norm")
    assert cpu.refused[0].startswith("scale 1, tp 1: launch 'eager': cpu has no eager_latency")


def test_table_and_plot(found: Gains, tmp_path: Path) -> None:
    with found.save(tmp_path / "gain.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gain"]) for row in rows] == [point.gain for point in found.points]
    assert found.save(tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    drawn = found.save(tmp_path / "gain.svg").read_text()
    assert "<svg" in drawn and "mathdefault" not in drawn  # ticks are numbers, not formulas
    with pytest.raises(OptionError, match=r"gain.txt: expected a name that ends in .csv, .png, .svg, .pdf"):
        found.save(tmp_path / "gain.txt")


def test_scaled_models() -> None:
    step = published_step("253B before fusion")
    small, whole = scaled(step, 0.125), scaled(published_step("253B"), 0.125)
    assert small.hidden == 2048 and small.attentions[0].heads == 16 and small.attentions[0].kv_heads == 8
    assert sum(part.width for part in small.ffns) == sum(part.width for part in whole.ffns)
    assert scaled(step, 1.0) is step


def test_settings_that_cannot_be_had_are_said() -> None:
    before, after = arrange(table("A30 30 30")), arrange(table("A30 30 30"), groups=[(1, 2)])
    found = gains(before, after, Workload(), H100, sizes=(2, 4), batches=(1,), scales=(1.0,))
    assert len(found.points) == 1 and found.refused[0].startswith("scale 1, tp 4: the FFN of layer 0")
    with pytest.raises(OptionError, match="no setting can be had: scale 1, tp 4"):
        gains(before, after, Workload(), H100, sizes=(4,), batches=(1,), scales=(1.0,))
