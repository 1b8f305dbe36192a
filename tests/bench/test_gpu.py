"""The GPU benchmark, run on the CPU with tiny shapes: does every step of it work, and go on where it stopped?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import Part, parts, summary
from bench.grid import Cell
from bench.record import Measurement, Record
from bench.show import by_kind
from bench.whole_models import Case, WindowCase

# What may not be needed: the machine with the GPU has torch, transformers, networkx, tabulate and pydantic.
RUN = """
import sys
for name in ("rich", "matplotlib", "typer", "hypothesis", "jinja2", "scipy", "playwright"):
    sys.modules[name] = None
from bench.gpu import main
main()
"""


def run(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, "--device", "cpu", "--small", "--out", str(path), "--rounds", "2", *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_the_most_important_parts_come_first() -> None:
    found = list(parts(small=False, gpu=True))
    assert [part.place["shape"] for part in found[:3]] == ["70B / 8", "Super-49B, run", "405B / 8"]
    assert all(part.place["mode"] == "max-autotune" and part.place["tokens"] == 1 for part in found[:3])
    assert [part.place["model"] for part in found if isinstance(part.of, Case)] == ["8B", "70B, 16 layers"] * 2
    assert len({tuple(part.place.items()) for part in found}) == len(found)
    windows = [part.place for part in found if isinstance(part.of, WindowCase)]
    assert [(one["phase"], one["windows"], one["mode"]) for one in windows] == [
        ("decode", "4", "reduce-overhead"),
        ("prefill", "4", "default"),
    ]
    whole_grid = {tuple(part.of.place.items()) for part in found if isinstance(part.of, Cell)}
    assert len(whole_grid) == 4 * 7 * 6 * 2, "lengths, shapes, tokens, types"


def test_a_machine_without_a_gpu_is_told_so() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode and "no GPU" in done.stderr


@pytest.mark.slow  # 60 s: every form is compiled
@pytest.mark.compile
def test_it_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run(path, "--parts", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    (first,) = Record.read(path).measurements
    done = run(path, "--parts", "4", "--continue")
    assert done.returncode == 0, done.stderr[-3000:]
    found = Record.read(path)
    assert found.measurements[0] == first and len(found.measurements) == 4 and found.complete
    assert [one.place.get("phase") for one in found.measurements] == [None, None, "decode", "decode"]
    windows = found.measurements[-1]
    assert windows.place["windows"] == "2" and set(windows.ratios) == {
        "intact/hoist 2",
        "intact/wide 2",
        "intact/intact again",
    }
    assert set(first.ratios) >= {
        "unfused/fused",
        "surgery/fused",
        "concatenated by call/fused",
        "unfused/unfused again",
    }
    assert first.facts["error, fused"] < 0.05 and 0 < first.facts["share of limit, fused"] < 5
    assert found.results["limits"]["bandwidth_bytes_per_second"] > 1e8


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--parts", "2", "--seconds", "-1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = Record.read(tmp_path / "gpu.json")
    assert not found.complete and len(found.left_out) == 2 and not found.measurements


def test_each_kind_has_a_table_of_its_own() -> None:
    times = {"unfused": [2.0], "fused": [1.0], "intact": [3.0], "hoist 2": [2.0]}
    chain = Measurement.of({"shape": "70B / 8", "members": 8}, times, [("unfused", "fused")])
    model = Measurement.of({"model": "8B", "phase": "decode"}, times, [("unfused", "fused")])
    window = Measurement.of({"model": "8B", "phase": "decode", "windows": "2"}, times, [("intact", "hoist 2")])
    kinds = by_kind([window, model, chain])
    assert kinds == {"chains": [chain], "models": [model], "windows": [window]}
    text = summary([window, model, chain])
    assert "1.50x" in text and text.count("2.00x") == 2 and len(text.split("\n\n")) == 3


def test_modes_of_one_cell_are_told_apart() -> None:
    cell = next(parts(small=True, gpu=True)).of
    assert Part(cell, ("reduce-overhead",), 1.0).place != Part(cell, (), 1.0).place
