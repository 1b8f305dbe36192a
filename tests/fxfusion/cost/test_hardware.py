"""Devices: their constants are possible, have a source, and can be given as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxfusion.cost import Hardware, Link, known_hardware
from fxfusion.errors import OptionError

GPUS = ("a100", "b200", "h100", "h200")
# Microseconds of one all-reduce over 2, 4, 8 H100, by bytes: sgl-project/sglang#2904.
ALL_REDUCE = {
    512: (3.7, 4.8, 5.9),
    4096: (3.9, 3.7, 5.7),
    32768: (4.5, 4.8, 7.8),
    262144: (7.9, 13.9, 16.7),
    524288: (12.5, 20.2, 22.1),
    1048576: (19.9, 31.1, 33.8),
}


def test_the_devices_that_come_with_the_package() -> None:
    assert known_hardware() == ("a100", "b200", "cpu", "h100", "h200")


@pytest.mark.parametrize("name", known_hardware())
def test_each_constant_is_possible_and_has_a_source(name: str) -> None:
    device = Hardware.of(name)
    assert device.name == name
    assert device.bandwidth <= device.memory_bandwidth
    assert all(device.rate(kind) <= device.flops[kind] for kind in device.flops)
    assert 0 <= device.kernel_latency < 1e-4 and 0 <= device.gemm_floor < 1e-4
    constants = set(Hardware.model_fields) - {"name", "link", "price", "fitted", "sources", "tiled"}
    constants = {field for field in constants if getattr(device, field) is not None}
    if device.link is not None:
        constants |= {f"link.{field}" for field in Link.model_fields}
    assert constants == set(device.sources) and all(device.sources.values())
    assert set(device.fitted) <= {"bandwidth_fraction", "kernel_latency", "gemm_floor", "megakernel_latency"}


def test_datasheets() -> None:
    rows = {name: Hardware.of(name) for name in GPUS}
    assert {name: round(row.memory_bandwidth / 1e9) for name, row in rows.items()} == {
        "a100": 2039,
        "b200": 8000,
        "h100": 3350,
        "h200": 4800,
    }
    assert {name: round(row.memory / 1e9) for name, row in rows.items()} == {
        "a100": 80,
        "b200": 180,
        "h100": 80,
        "h200": 141,
    }
    assert "fp8" not in rows["a100"].flops and "fp4" not in rows["h200"].flops


def test_all_reduce_follows_what_was_measured() -> None:
    link = Hardware.of("h100").link
    assert link is not None
    for size, row in ALL_REDUCE.items():
        for devices, measured in zip((2, 4, 8), row, strict=True):
            assert link.all_reduce_seconds(size, devices) * 1e6 == pytest.approx(measured, rel=0.3)
    assert link.is_one_kernel(512 * 1024, 8) and not link.is_one_kernel(2e6, 8)  # vLLM merges up to 0.5 MB over 8
    gigabyte = link.all_reduce_seconds(1e9, 8)
    assert 1.75e9 / 450e9 < gigabyte < 1.75e9 / 300e9  # a ring: between the line rate and two thirds of it


def test_a_file(tmp_path: Path) -> None:
    h100 = Hardware.of("h100")
    path = h100.save(tmp_path / "mine.json")
    assert Hardware.of(path) == Hardware.of(str(path)) == h100
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        "name: mine\nmemory: 1e9\nmemory_bandwidth: 1e9\nflops: {fp32: 1e9}\nprocessors: 1\nbandwidth_fraction: 0.5\n"
        "compute_fraction: 0.5\nkernel_latency: 0.0\ngemm_floor: 0.0\nprice: 2.5\n",
        "utf-8",
    )
    mine = Hardware.of(yaml)
    assert (mine.bandwidth, mine.rate("fp32"), mine.price, mine.link) == (5e8, 5e8, 2.5, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth_fraction": 1.01}, "bandwidth_fraction: Input should be less than or equal to 1, got 1.01"),
        ({"memory_bandwidth": -1.0}, "memory_bandwidth: Input should be greater than 0"),
        ({"memory_bandwith": 1.0}, "unknown field 'memory_bandwith'"),
        ({"flops": {"fp9": 1.0}}, "flops.fp9"),
        ({"flops": {"fp8": 0.0}}, "flops.fp8: expected a rate above 0"),
        ({"fitted": ["speed"]}, "there is no 'speed'"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(Hardware.of("h100").to_dict() | change), "utf-8")
    with pytest.raises(OptionError, match=f"wrong.json.*{message}"):
        Hardware.of(path)


def test_a_link_is_no_faster_than_its_wires(tmp_path: Path) -> None:
    fields = Hardware.of("h100").to_dict()
    fields["link"]["large_bandwidth"] = 2 * fields["link"]["bandwidth"]
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(fields), "utf-8")
    with pytest.raises(OptionError, match="large_bandwidth is above the link's bandwidth"):
        Hardware.of(path)


def test_unknown_devices(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no device 'h1000'; there are: a100, b200, cpu, h100, h200"):
        Hardware.of("h1000")
    with pytest.raises(OptionError, match="hardware: .*gone.json: cannot be read"):
        Hardware.of(tmp_path / "gone.json")
    with pytest.raises(OptionError, match="'fp4': h100 computes in fp8, int8, bf16"):
        Hardware.of("h100").rate("fp4")
