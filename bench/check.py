"""Regression guard: counts that do not depend on the machine, against those recorded in bench/results/check.json.

    python -m bench.check            compares; ends with an error where something got worse (the tests do the same)
    python -m bench.check --record   renews the recorded values

Counted on one fixed decoder of 8 layers: calls of fxfusion's own functions during match, plan, rewrite and their
growth from half of them, nodes, packs and their bytes, copies of weights left in the graph, kernels that Inductor
makes, and row-parallel products, each of which is one all-reduce under tensor parallelism. Seconds are not compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import fxfusion
from bench.pass_time import decoder
from bench.record import Record, arguments, record, versions
from bench.show import table
from fxfusion.compiler.capture import CapturedGraph, capture_dynamo
from fxfusion.compiler.packing import live_packs
from fxfusion.compiler.pipeline import FusedGraph, fuse_captured
from fxfusion.plan.policy import FusionPolicy

LAYERS = 8
COMPILED_LAYERS = 4  # by Inductor, which takes longest
# How much more is no regression: sets of nodes are walked in an order of their addresses. All else must be equal.
TOLERANCE = {"function calls": 0.03, "function calls, growth from half the layers": 0.03}
OURS = (str(Path(fxfusion.__file__).parent), str(Path(fxfusion.__file__).parents[1] / "passes"))


def counts(*, kernels: bool) -> dict[str, float]:
    """All counts; `kernels`: those of Inductor too, which compiles the model twice."""
    half, _ = fused_with_calls(LAYERS // 2)
    calls, fused = fused_with_calls(LAYERS)
    report = fused.report
    names = [getattr(node.target, "__name__", str(node.target)) for node in fused.module.graph.nodes]
    found: dict[str, float] = {
        "function calls": calls,
        "function calls, growth from half the layers": calls / half,
        "nodes before": report.nodes_before,
        "nodes after": report.nodes_after,
        "groups": len(report.groups),
        "weights concatenated in the graph": names.count("cat"),
        "packed bytes": sum(group.packed_bytes for group in report.groups),
        "all-reduces before": len(report.blocks_before),  # one for each block: its last product is row-parallel
        "all-reduces after": len(report.blocks_after),
        **packs(),
    }
    return found | (kernel_counts() if kernels else {})


def captured(layers: int) -> CapturedGraph:
    """The decoder's graph, as Dynamo gives it to a backend."""
    torch.compiler.reset()
    seen: list[CapturedGraph] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(capture_dynamo(gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(decoder(layers, True), backend=backend, dynamic=False)(torch.randn(1, 16, 128))
    return seen[0]


def fused_with_calls(layers: int) -> tuple[int, FusedGraph]:
    """Calls of fxfusion's Python functions from the captured graph to the rewritten one."""
    graph, called = captured(layers), 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal called
        called += event == "call" and frame.f_code.co_filename.startswith(OURS)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        with torch.no_grad():  # as it was captured
            fused = fuse_captured(graph, FusionPolicy())
    finally:
        sys.setprofile(before)
    return called, fused


def packs() -> dict[str, float]:
    """Packed groups that one more graph and two recompiles leave alive, beyond those of other models."""
    torch.compiler.reset()
    others, model = live_packs(), decoder(LAYERS, True)
    compiled = torch.compile(
        model, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True}, dynamic=False
    )
    found = {}
    with torch.no_grad():
        for graphs in (1, 3):
            for tokens in range(16, 16 + graphs):
                compiled(torch.randn(1, tokens, 128))
            found[f"packs after {graphs} graphs"] = live_packs() - others
    return found


def kernel_counts() -> dict[str, float]:
    """Kernels that Inductor makes of four layers, from nothing: unfused and fused."""
    from torch._inductor import metrics

    found = {}
    for name, backend in (("unfused", "inductor"), ("fused", fxfusion.ffn_fusion)):
        torch.compiler.reset()
        metrics.reset()
        compiled = torch.compile(decoder(COMPILED_LAYERS, True), backend=backend, dynamic=False)
        with torch.no_grad(), torch._inductor.utils.fresh_cache():
            compiled(torch.randn(1, 16, 128))
        found[f"kernels, {name}"] = metrics.generated_kernel_count
    return found


def worse(found: Mapping[str, float], recorded: Mapping[str, float]) -> list[str]:
    """What is not as recorded, in words. Fewer function calls are no fault."""
    problems = [f"{name}: not recorded" for name in found if name not in recorded]
    for name in found.keys() & recorded.keys():
        value, wanted, room = found[name], recorded[name], TOLERANCE.get(name)
        if room is None and value != wanted:
            problems.append(f"{name}: {value:g}, recorded {wanted:g}")
        elif room is not None and value > wanted * (1 + room):
            problems.append(f"{name}: {value:g}, more than {room:.0%} above the recorded {wanted:g}")
    return sorted(problems)


def recorded() -> Mapping[str, float]:
    """The recorded counts. Raises `ValueError` where another torch made them: its graphs and kernels differ."""
    before = Record.read("check")
    ours, here = (all_[name] for all_ in (before.versions, versions()) for name in ("torch",))
    if ours.split("+")[0] != here.split("+")[0]:
        raise ValueError(f"recorded with torch {ours}, this is {here}: renew by python -m bench.check --record")
    return before.results["counts"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--record", action="store_true", help="renew the recorded values")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = counts(kernels=True)
    if chosen.record:
        print(table(found.items(), ("what", "count")))
        print("recorded:", record("check", {"counts": found}).name)
        return
    before = recorded()
    print(table([(name, value, before.get(name)) for name, value in found.items()], ("what", "count", "recorded")))
    problems = worse(found, before)
    if problems:
        sys.exit("worse than recorded:\n  " + "\n  ".join(problems))


if __name__ == "__main__":
    main()
