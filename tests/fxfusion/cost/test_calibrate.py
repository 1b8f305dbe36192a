"""Constants of the machine at hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from fxfusion.cost import Hardware, calibrate, simulate
from fxfusion.errors import OptionError


def test_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fxfusion.cost.calibrate")
    monkeypatch.setattr(module, "_READ_BYTES", {"cpu": 2**26})
    monkeypatch.setattr(module, "_EDGE", {"cpu": 256})
    found = calibrate(seconds=0.3)
    assert 1e8 < found.memory_bandwidth < 1e12  # zero pages would show ten times the bandwidth of a laptop or more
    assert set(found.flops) == {"fp32", "bf16"} and all(1e8 < rate < 1e14 for rate in found.flops.values())
    assert 1e-8 < found.kernel_latency < 1e-3 and 0 <= found.gemm_floor < 1e-3
    assert found.processors == torch.get_num_threads() and found.memory > 1e8
    assert Hardware.of(found.save(tmp_path / "here.json")) == found
    assert simulate("llama-3.3-70b", hardware=found, precision="bf16").latency_ms > 0


@pytest.mark.parametrize(
    ("device", "seconds", "message"),
    [
        ("cpu", 0.0, "seconds: expected more than 0 and at most 60"),
        ("cpu", 61.0, "seconds: expected more than 0 and at most 60"),
        ("gpu", 1.0, "device 'gpu' cannot be used here"),
        ("meta", 1.0, "device 'meta'"),
    ],
)
def test_what_cannot_be_measured(device: str, seconds: float, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(device, seconds=seconds)
