"""Tokens per second of the fused reference model against the unfused one, inside other engines.

    make engines                 # once: the environments
    python -m bench.engines      # all engines; --rounds N, --only NAME

Both folders lack the same attention; one has five FFNs fused into one. All candidates of an engine live in one
process, with one thread, and are timed in turn; the control is a second copy of the unfused folder. Tokens per second
are of this machine and moment; the ratios are the result. How well the engines agree with us is `make engines`' matter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.engine_environments import run_script
from bench.engine_folders import write_folders
from bench.record import Measurement, Scalar, record
from bench.tables import ratio_table

RUNS: dict[str, tuple[str, str, dict[str, bool]]] = {
    "mlx-lm": ("mlx", "time_mlx.py", {}),
    "vllm, eager": ("vllm", "time_vllm.py", {"enforce_eager": True}),
    "vllm, compiled": ("vllm", "time_vllm.py", {"enforce_eager": False}),
}
FASTER, CONTROL = "unfused/fused", "unfused/control"
_TIMEOUT = 1800.0  # seconds; compiling takes minutes on few cores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", choices=RUNS)
    chosen = parser.parse_args()
    names = [chosen.only] if chosen.only else list(RUNS)
    engines: dict[str, Any] = {}
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as root:
        write_folders(Path(root))
        for name in names:
            print(f"timing {name}", flush=True)
            engines[name], found = _time(name, Path(root), chosen.rounds)
            measurements += found
    print(ratio_table(measurements, [(FASTER, "fused, times faster [95 %]"), (CONTROL, "control [95 %]")]))
    if chosen.only is None:
        print("recorded:", record("engines", engines, measurements=measurements).name)


def _time(name: str, root: Path, rounds: int) -> tuple[dict[str, Any], list[Measurement]]:
    """Versions and options of one engine, and what its workloads took."""
    engine, script, options = RUNS[name]
    scratch = root / name.replace(", ", "-")
    scratch.mkdir()
    folders = {"fused": "fused", "unfused": "unfused", "control": "unfused"}
    request = {
        "folders": {key: str(root / folder) for key, folder in folders.items()},
        "rounds": rounds,
        "options": options,
    }
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    run_script(engine, script, [scratch / "request.json", scratch / "result.json"], scratch, timeout=_TIMEOUT)
    found = json.loads((scratch / "result.json").read_text("utf-8"))
    measurements = [_workload(name, workload, **values) for workload, values in found["workloads"].items()]
    return {"versions": found["versions"], "options": options}, measurements


def _workload(engine: str, workload: str, tokens: int, seconds: dict[str, list[float]]) -> Measurement:
    """`tokens`: written or read by one call."""
    speeds: dict[str, Scalar] = {
        f"tokens_per_second, {name}": round(tokens / statistics.median(times), 1) for name, times in seconds.items()
    }
    samples = {name: [round(one, 5) for one in times] for name, times in seconds.items()}
    pairs = [tuple(name.split("/")) for name in (FASTER, CONTROL)]
    place = {"engine": engine, "workload": workload}
    return Measurement.of(place, samples, pairs, facts={"tokens_per_call": tokens, **speeds})


if __name__ == "__main__":
    main()
