"""Time what is compared in turn: each round runs every candidate once, in an order drawn anew.

    python time_ENGINE.py REQUEST.json RESULT.json

REQUEST.json is {"folders": {"fused": FOLDER, "unfused": FOLDER, "control": FOLDER}, "rounds": N, "options": {...}}.
RESULT.json has the versions, and for each workload its tokens a call and the seconds of every call. The control is the
unfused folder once more: how much its ratio differs from 1 is noise.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
Workloads = dict[str, tuple[int, Call]]  # tokens of one call, and the call
PROMPT = list(range(100, 116))  # token ids; speed does not depend on which
# The one timer, without the package around it, which is not installed here.
sample = runpy.run_path(str(Path(__file__).resolve().parents[1] / "fxfusion" / "cost" / "interleaved.py"))["sample"]


def main(load: Callable[[str, dict], Any], workloads: Callable[[Any], Workloads], facts: dict) -> None:
    """`load(folder, options)` gives a model, `workloads(model)` names what to run, with the tokens of one call."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    models = {name: load(folder, request["options"]) for name, folder in request["folders"].items()}
    offered = {name: workloads(model) for name, model in models.items()}
    found: dict[str, Any] = {}
    for workload, (tokens, _) in offered["unfused"].items():
        calls = {name: each[workload][1] for name, each in offered.items()}
        found[workload] = {"tokens": tokens, "seconds": sample(calls, request["rounds"], sample_seconds=0.0)}
        print("timed", workload, flush=True)
    Path(sys.argv[2]).write_text(json.dumps({**facts, "workloads": found}), encoding="utf-8")
