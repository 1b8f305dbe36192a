"""The GPU benchmark, run on the CPU with tiny shapes: does every step of it work, and go on where it stopped?"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import Expected, Part, compared, device_of, expected, kernels_of_forms, parts, summary
from bench.grid import SHAPES, Cell
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
    assert [type(part.of) for part in found[:3]] == [Cell, Case, WindowCase], "every form, tiny"
    assert all("small" in part.place.values() for part in found[:3])
    kept, chains = [found[place] for place in (3, 4, 8)], found[5:8]
    assert [part.place["model"] for part in kept] == ["1B", "8B", "SmolLM2-135M"]
    assert all(isinstance(part.of, WindowCase) and part.of.names == ["hoist 4", "wide 4", "dropped"] for part in kept)
    assert [part.place["shape"] for part in chains] == ["70B / 8", "Super-49B, run", "405B / 8"]
    assert all(part.place["tokens"] == 1 for part in chains)
    assert all(part.modes == ("reduce-overhead", "max-autotune") for part in (*kept, *chains))
    assert [part.place["model"] for part in found[9:] if isinstance(part.of, Case)] == ["8B", "70B, 16 layers"] * 2
    assert len({tuple(part.place.items()) for part in found}) == len(found)
    whole_grid = {tuple(part.of.place.items()) for part in found[3:] if isinstance(part.of, Cell)}
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
    assert "expected" in done.stdout and "intact/wide 2" in done.stdout
    done = run(path, "--parts", "4", "--continue")
    assert done.returncode == 0, done.stderr[-3000:]
    found = Record.read(path)
    assert found.measurements[0] == first and len(found.measurements) == 4 and found.complete
    assert [one.place.get("windows") for one in found.measurements] == ["2", None, None, None]
    assert set(first.ratios) == {"intact/hoist 2", "intact/wide 2", "intact/dropped", "intact/intact again"}
    assert first.facts["share of limit, dropped"]
    wanted = found.predictions["small, decode, 8, bfloat16, 2, default"]["intact/wide 2"]
    assert 1 < wanted["low"] <= wanted["high"]
    chain = found.measurements[1]
    assert set(chain.ratios) >= {
        "unfused/fused",
        "surgery/fused",
        "concatenated by call/fused",
        "unfused/unfused again",
    }
    assert chain.facts["error, fused"] < 0.05 and 0 < chain.facts["share of limit, fused"] < 5
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


# --- what is expected ---------------------------------------------------------------------------------

H200 = device_of("NVIDIA H200")


def chain(length: int, tokens: int, modes: tuple[str, ...] = ("max-autotune",)) -> Part:
    return Part(Cell(SHAPES["70B / 8"], length, tokens, torch.bfloat16), modes, 1.0)


@pytest.mark.parametrize(("shape", "length", "launches"), [("1B", 8, [41, 6]), ("1B", 4, [21, 6])])
def test_launches_are_those_of_a_compile(shape: str, length: int, launches: list[int]) -> None:
    """Of `torch.compile` for sm_90 without a GPU: 24 products and 17 kernels of Triton; fused three and three."""
    forms, _ = kernels_of_forms(Cell(SHAPES[shape], length, 1, torch.bfloat16))
    assert [len(kernels) for kernels in forms.values()] == launches


def test_a_chain_by_hand() -> None:
    """At the quick end: the same bytes of weights, and 35 launches less."""
    found = expected(chain(8, 1), H200)["unfused, max-autotune/fused, max-autotune"]
    weights = 8 * 3 * 8192 * 3584 * 2 / H200.bandwidth
    assert found.low == pytest.approx((weights + 41 * 1.3e-6) / (weights + 6 * 1.3e-6), rel=0.01)
    floors = 41 * H200.kernel_latency + 24 * H200.gemm_floor
    assert found.high == pytest.approx(floors / (weights + 6 * H200.kernel_latency), rel=0.02)


def test_what_is_expected_of_each_part() -> None:
    name = "unfused, max-autotune/fused, max-autotune"
    long, short, many = (expected(chain(*of), H200)[name] for of in ((8, 1), (2, 1), (8, 2048)))
    assert long.low > short.low > 1 and many.high < long.low < long.high
    shown = expected(chain(8, 1, ()), H200)
    assert shown["unfused/fused"].low == pytest.approx(long.low) and "share of limit, fused" in shown
    for part in itertools.islice(parts(small=False, gpu=True), 20):
        assert all(0 <= one.low <= one.high for one in expected(part, H200).values())
    assert device_of("NVIDIA H100 80GB HBM3").name == "h100" and device_of("another").name == "h200"


def test_measured_beside_expected() -> None:
    place = {"shape": "70B / 8", "members": 8}
    one = Measurement.of(place, {"unfused": [1.5] * 3, "fused": [1.0] * 3}, [("unfused", "fused")])
    one = one.model_copy(update={"facts": {"share of limit, fused": 0.5}})
    wanted = {"70B / 8, 8": {"unfused/fused": Expected(1.1, 1.4), "share of limit, fused": Expected(0.4, 0.6)}}
    above, share = compared([one], wanted).splitlines()[2:]
    assert "1.50x [1.50, 1.50]" in above and "1.10 to 1.40" in above and above.endswith("above")
    assert "0.50" in share and share.endswith("as expected")
    assert Expected(1.6, 2.0).judge(1.4, 1.5) == "below" and Expected(1.0, 1.2).judge(1.1, 1.3) == "as expected"
    assert len(compared([one], {}).splitlines()) == 2
