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

from tabulate import tabulate

from bench.engine_environments import run_script
from bench.engine_folders import write_folders
from bench.record import record
from bench.timing import ratio

RUNS: dict[str, tuple[str, str, dict[str, bool]]] = {
    "mlx-lm": ("mlx", "time_mlx.py", {}),
    "vllm, eager": ("vllm", "time_vllm.py", {"enforce_eager": True}),
    "vllm, compiled": ("vllm", "time_vllm.py", {"enforce_eager": False}),
}
_TIMEOUT = 1800.0  # seconds; compiling takes minutes on few cores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", choices=RUNS)
    chosen = parser.parse_args()
    names = [chosen.only] if chosen.only else list(RUNS)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        write_folders(Path(root))
        for name in names:
            print(f"timing {name}", flush=True)
            results[name] = _time(name, Path(root), chosen.rounds)
    _show(results)
    if chosen.only is None:
        print("recorded:", record("engines", results).name)


def _time(name: str, root: Path, rounds: int) -> dict[str, Any]:
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
    return {
        "versions": found["versions"],
        "options": options,
        "workloads": {workload: _ratios(**values) for workload, values in found["workloads"].items()},
    }


def _ratios(tokens: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "tokens_per_call": tokens,
        "tokens_per_second": {name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()},
        "fused_over_unfused": ratio(seconds["unfused"], seconds["fused"]).to_dict(),
        "control": ratio(seconds["unfused"], seconds["control"]).to_dict(),
        "seconds": {name: [round(one, 5) for one in times] for name, times in seconds.items()},
    }


def _show(results: dict[str, Any]) -> None:
    rows = [
        (name, workload, *(_interval(found[key]) for key in ("fused_over_unfused", "control")))
        for name, run in results.items()
        for workload, found in run["workloads"].items()
    ]
    print(tabulate(rows, headers=["engine", "workload", "fused, times faster [95 %]", "control [95 %]"]))


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
