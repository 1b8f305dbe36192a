"""The compiler itself: how its time and memory grow with layers, and what it takes on models of hundreds of billions.

    python -m bench.scale [--seconds 200] [--layers 16 32 64 128 256] [--continue]

Each measurement is a process of its own, on one thread. Models are on the `meta` device, without weights:

    whole     405B with Ultra's attention pattern, and Super-49B: captured, matched, planned, rewritten, exported dry
    growth    decoders of 16 to 256 layers, five of each eight without attention
    compile   a decoder of 16 layers with small weights, compiled by Inductor from nothing: unfused and fused

Goals: whole under 60 s and 4 GB each; growth linear in layers; fused compiles faster than unfused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

from bench.record import RESULTS, Measurement, Session, arguments
from bench.show import bytes_, seconds, table

WHOLE = ("llama-3.1-405b", "nemotron-super-49b")
LAYERS = (16, 32, 64, 128, 256)
PREDICTIONS = {
    "whole": "25 s for 405B, almost all of it Dynamo's; 0.6 GB",
    "growth": "fxfusion's own part linear: 256 layers at most 20x of 16",
    "compile": "fused 1.5x to 2x faster: Inductor sees fewer nodes and kernels",
}

_START = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
import fxfusion
from fxfusion.compiler import pipeline
from fxfusion.graph import debug
spent = {}
capture = pipeline.capture_model
def timed(*arguments):
    start = time.perf_counter()
    found = capture(*arguments)
    spent["capture"] = time.perf_counter() - start
    return found
pipeline.capture_model = timed
def finish(**facts):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": spent, "peak": peak, "facts": facts}))
def explain(model):
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    start = time.perf_counter()
    report = fxfusion.explain(model, tokens, policy="paper", use_cache=False)
    spent["explain"] = time.perf_counter() - start
    spent["fxfusion"] = spent["explain"] - spent["capture"]
    return report
"""
_WHOLE = """
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.checkpoints.nemotron_nas.tables import decoder_of, without_attention_before_fusion
from fxfusion.cost.layer_table import LayerTable, paper_plan
ultra = LayerTable.published("nemotron-ultra-253b")
gone = without_attention_before_fusion(ultra) if sys.argv[1] == "llama-3.1-405b" else ()
start = time.perf_counter()
table = LayerTable.published(sys.argv[1])
model = decoder_of(table, without_attention=gone)
report = explain(model)
begun = time.perf_counter()
plan = fxfusion.FusionPlan(dropped_attention=gone, groups=[[int(one.name.split(".")[2]) for one in group.members]
                           for group in report.groups], norm="last")
if sys.argv[1] != "llama-3.1-405b":
    assert plan.groups == paper_plan(table).groups
spent["plan"] = time.perf_counter() - begun
begun = time.perf_counter()
export = plan_export(model)
spent["dry-run export"] = time.perf_counter() - begun
spent["all"] = time.perf_counter() - start
finish(nodes=report.graphs[0].nodes_before, nodes_after=report.graphs[0].nodes_after,
       members=sum(len(group) for group in plan.groups), groups=len(plan.groups), tensors=len(export.tensors))
"""
_GROWTH = """
from transformers import LlamaConfig, LlamaForCausalLM
layers = int(sys.argv[1])
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=64)
with torch.device("meta"):
    model = LlamaForCausalLM(config).eval()
gone = [layer for layer in range(layers) if layer % 8 > 2]
fxfusion.drop_attention(model, gone, check=False)
report = explain(model)
finish(nodes=report.graphs[0].nodes_before, groups=len(report.groups))
"""
_COMPILE = """
from bench.pass_time import compile_seconds, decoder
from fxfusion import ffn_fusion
def first_call(layers, backend):
    torch.compiler.reset()
    model = decoder(layers, True)
    x = torch.randn(1, 16, 128)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        start = time.perf_counter()
        compiled(x)
        return time.perf_counter() - start
for backend in ("inductor", ffn_fusion):
    first_call(2, backend)  # warm-up: imports, workers
found = {"unfused": [], "fused": []}
for turn in range(int(sys.argv[1])):
    for name, backend in (("unfused", "inductor"), ("fused", ffn_fusion))[:: 1 if turn % 2 else -1]:
        found[name].append(first_call(16, backend))
spent.update(found)
finish()
"""


def child(script: str, argument: object, **environment: str) -> dict[str, Any]:
    """What a fresh process printed. Raises `RuntimeError` with its last words."""
    command, settings = [sys.executable, "-c", script, str(argument)], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parents[1], check=False, env=settings)
    if done.returncode:
        raise RuntimeError(f"{argument}: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def whole(name: str) -> Measurement:
    return _measurement({"what": "whole", "model": name}, [child(_START + _WHOLE, name)])


def growth(layers: int, repeats: int) -> Measurement:
    return _measurement({"what": "growth", "layers": layers}, [child(_START + _GROWTH, layers) for _ in range(repeats)])


def compile_time(rounds: int) -> Measurement:
    found = child(_START + _COMPILE, rounds)
    return Measurement.of({"what": "compile", "layers": 16}, found["seconds"], [("unfused", "fused")])


def _measurement(place: dict[str, str | int], runs: list[dict[str, Any]]) -> Measurement:
    samples = {name: [run["seconds"][name] for run in runs] for name in runs[0]["seconds"]}
    facts = {"peak_bytes": max(run["peak"] for run in runs), **runs[0]["facts"]}
    return Measurement.of(place, samples, facts=facts)


def show(measurements: list[Measurement]) -> str:
    rows = [
        (
            *(one.place.get(name) for name in ("what", "model", "layers")),
            *(seconds(one.medians[name].value) if name in one.medians else None for name in _STEPS),
            bytes_(float(one.facts["peak_bytes"] or 0)) if "peak_bytes" in one.facts else None,
        )
        for one in measurements
    ]
    return table(rows, ["what", "model", "layers", *_STEPS, "peak memory"])


_STEPS = ("capture", "fxfusion", "dry-run export", "all", "unfused", "fused")


def main() -> None:
    parser = arguments(__doc__, seconds=200.0)
    parser.add_argument("--layers", type=int, nargs="*", default=list(LAYERS))
    parser.add_argument("--repeats", type=int, default=1, help="processes for each number of layers")
    chosen = parser.parse_args()
    with Session("scale", seconds=chosen.seconds, fresh=not chosen.go_on) as session:
        session.predictions = PREDICTIONS
        for name in WHOLE:
            session.do({"what": "whole", "model": name}, partial(whole, name), needs=60.0)
        session.do({"what": "compile", "layers": 16}, lambda: compile_time(2), needs=50.0)
        for layers in chosen.layers:
            run = partial(growth, layers, chosen.repeats)
            session.do({"what": "growth", "layers": layers}, run, needs=10 + layers / 4)
    print(show(session.measurements))


if __name__ == "__main__":
    main()
