"""How long a user waits from a trained model to the page of results, on the reference model, offline.

    python -m bench.whole_path

Each command runs in a process of its own, as from a shell: score -> plan -> explain -> eval (drops the attention,
compiles with the plan, evaluates and writes text) -> report. Goal (issue 3): under 5 minutes on 2 cores.
Choices are made on calibration text, quality is measured on held-out text.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import record
from bench.reference.load import CALIBRATION_FILE, HELD_OUT_FILE, MODEL_FOLDER
from bench.tables import table

GOAL_SECONDS = 300
DROP = 5  # attentions, of 12
_TIMES = ("seconds", "processor_seconds")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = whole_path(Path(folder))
    rows = [(name, *(f"{step[what]:.1f}" for what in _TIMES)) for name, step in found["steps"].items()]
    total = ("total", *(f"{found[f'total_{what}']:.1f}" for what in _TIMES))
    print(table([*rows, total], ("command", "seconds", "processor seconds")))
    path = record("whole_path", found, predictions={"total_seconds": f"at most {GOAL_SECONDS} on 2 cores"})
    print(f"written: {path.name}")


def whole_path(results: Path, *more: str) -> dict[str, Any]:
    """Seconds of each command and of all, with what they found. `more`: options of every measuring command."""
    calibration, heldout = (str(MODEL_FOLDER / name) for name in (CALIBRATION_FILE, HELD_OUT_FILE))
    kept, plan, model = ["--results", str(results)], str(results / "plan.yaml"), str(MODEL_FOLDER)
    commands = {
        "score": ["score", model, "--text", calibration, *kept, *more],
        "plan": ["plan", model, "--text", calibration, "--drop", str(DROP), *kept, *more],
        "explain": ["explain", model, "--plan", plan],
        "eval": ["eval", model, "--text", heldout, "--plan", plan, "--generate", "8", *kept, *more],
        "report": ["report", *kept],
    }
    steps = {name: _run(name, arguments) for name, arguments in commands.items()}
    return {
        "steps": {name: {what: step[what] for what in _TIMES} for name, step in steps.items()},
        **{f"total_{what}": sum(step[what] for step in steps.values()) for what in _TIMES},
        "plan": {name: steps["plan"]["found"]["plan"][name] for name in ("dropped_attention", "groups", "norm")},
        "quality": steps["eval"]["found"]["quality"],
        "page_bytes": Path(steps["report"]["found"]["page"]).stat().st_size,
    }


def _run(name: str, arguments: list[str]) -> dict[str, Any]:
    """One command with --json: what it printed, wall time, and processor time of all its threads."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fxfusion.cli", *arguments, "--json"]
    started, used = time.perf_counter(), _processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=MODEL_FOLDER.parents[2])
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"fxfusion {name} failed with {done.returncode}: {done.stderr[-2000:]}")
    print(f"{name}: {seconds:.1f} s", file=sys.stderr)
    return {
        "seconds": seconds,
        "processor_seconds": _processor_seconds() - used,
        "found": json.loads(done.stdout),
    }


def _processor_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
