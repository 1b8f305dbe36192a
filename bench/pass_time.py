"""What fxfusion adds to torch.compile, and how matching grows with depth.

    python -m bench.pass_time
    python -m bench.pass_time --dependency      what reuse saves in a dependency matrix: dependency_speed.json

Goals: matching and rewriting at most 5 % of the compile time of a 32-layer model; 128 layers
at most 4.5x the pass time of 32; with nothing to fuse at most 2 %, and outputs identical to Inductor's;
the never-stale check at most 100 us per call for 32 fused layers, no concat of parameters in the
compiled graph, one set of packed buffers per group however many graphs were compiled.

The dependency matrix of the reference model: at most 0.6x the time of brute force, in one run. All run the
same captured graph on the same batch and measure the same distances; the matrices must agree bit by bit:

    brute force   each row runs the whole model, embedding to logits
    row by row    each row starts at the embedding and stops after the last block; no run for the empty last row
    reuse         each row starts after the removed block: what `dependency_matrix` does
"""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bench.chain_speed import Ffn
from bench.record import Measurement, arguments, measure, record
from bench.reference import calibration_batches, load_model
from bench.show import ratio_table, table
from fxfusion import ffn_fusion, last_reports
from fxfusion.analysis.batches import TokenBatch, read_batches
from fxfusion.analysis.dependency import Unit, blocks_of, measure_batch
from fxfusion.analysis.measures import Directions, block_nodes, contribution, cosine_distance
from fxfusion.backend import seconds_inside
from fxfusion.compiler.packing import live_packs
from fxfusion.models.traced import TracedGraph, TracedModel

HIDDEN, WIDTH, HEADS = 128, 352, 4
BATCH, SEQ, ROUNDS = 2, 256, 5  # of the dependency matrix
UNITS: tuple[Unit, ...] = ("ffn", "block")


class Attention(nn.Module):
    """`x + o(attention(q, k, v))`, x: [batch, tokens, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, HIDDEN))


def decoder(layers: int, attention_free: bool) -> nn.Sequential:
    """A Llama-shaped stack; with `attention_free`, five of each eight layers have no attention."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for layer in range(layers):
        if not attention_free or layer % 8 < 3:
            blocks.append(Attention())
        blocks.append(Ffn(HIDDEN, WIDTH))
    return nn.Sequential(*blocks).eval()


def compile_seconds(layers: int, attention_free: bool, options: dict[str, Any]) -> dict[str, Any]:
    """One cold compile: total seconds, seconds inside fxfusion, outputs."""
    torch.compiler.reset()
    model = decoder(layers, attention_free)
    x = torch.randn(1, 16, HIDDEN, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend=ffn_fusion, options=options, dynamic=False)
    inside, start = seconds_inside(), time.perf_counter()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        output = compiled(x)
        total = time.perf_counter() - start
        inside = seconds_inside() - inside
        torch.compiler.reset()
        plain = torch.compile(model, backend="inductor", dynamic=False)(x)
    return {
        "layers": layers,
        "total_seconds": total,
        "fxfusion_seconds": inside,
        "share": inside / total,
        "groups": len(last_reports()[-1].groups),
        "identical_to_inductor": bool(torch.equal(output, plain)),
    }


def growth(repeats: int = 5) -> Measurement:
    """Pass seconds of 32 and 128 layers, captured anew each time, interleaved; the first capture is no sample.

    Without the garbage collector, as timeit does it: its pauses grow with everything else in the process.
    """
    samples: dict[int, list[float]] = {32: [], 128: []}
    for _ in range(repeats):
        for layers in samples:
            torch.compiler.reset()
            compiled = torch.compile(decoder(layers, True), backend=ffn_fusion, options={"compiler": "eager"})
            before = seconds_inside()
            gc.collect()
            gc.disable()
            with torch.no_grad():
                compiled(torch.randn(1, 16, HIDDEN))
            gc.enable()
            samples[layers].append(seconds_inside() - before)
    named = {f"{layers} layers": found[1:] for layers, found in samples.items()}
    return Measurement.of({"what": "pass time"}, named, [("128 layers", "32 layers")])


def call_overhead() -> dict[str, Any]:
    """Microseconds per call of the never-stale check for 32 fused layers, measured on the check itself."""
    torch.compiler.reset()
    model = nn.Sequential(*(Ffn(32, 64) for _ in range(32)))
    seen: list[Any] = []
    compiled = torch.compile(model, backend=_spy(seen), dynamic=False)
    x = torch.randn(4, 32)
    with torch.no_grad():
        compiled(x)
        fused, inputs = seen[-1]
        check = Timer("packs.tensors(inputs)", globals={"packs": fused.packs, "inputs": inputs}, num_threads=1)
        seconds = check.blocked_autorange(min_run_time=1.0).median
    cats = [node for node in last_reports()[-1].after.graph.nodes if getattr(node.target, "__name__", "") == "cat"]
    packs = live_packs()
    with torch.no_grad():
        compiled(torch.randn(8, 32))
        compiled(torch.randn(16, 32))
    return {
        "check_microseconds_per_call": seconds * 1e6,
        "sources": len(fused.packs.positions),
        "parameter_cats_in_graph": len(cats),
        "packs_after_one_graph": packs,
        "packs_after_three_graphs": live_packs(),
    }


def _spy(seen: list[Any]) -> Any:
    """The backend, noting what it returns and the inputs that it was given."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        fused = ffn_fusion(gm, inputs, options={"compiler": "eager"})
        seen.append((fused, tuple(inputs)))
        return fused

    return backend


def without_reuse(graph: TracedGraph, batch: TokenBatch, unit: Unit, *, whole_model: bool) -> Tensor:
    """Sums of the matrix `[L, L]`, every row from the embedding on."""
    blocks = blocks_of(graph, unit)
    end = [graph.logits] if whole_model else []
    intact = graph.run(batch.inputs, [*end, *(node for block in blocks for node in block_nodes(block))])
    own = [Directions.of(contribution(intact, block, batch.seen)) for block in blocks]
    sums = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    for row, removed in enumerate(blocks if whole_model else blocks[:-1]):
        later = blocks[row + 1 :]
        run = graph.run(batch.inputs, [*end, *(node for block in later for node in block_nodes(block))], [removed])
        for column, block in enumerate(later, start=row + 1):
            distance = cosine_distance(own[column], Directions.of(contribution(run, block, batch.seen)))
            sums[row, column] = distance.sum(dtype=torch.float64)
    return sums


def compare(graph: TracedGraph, batch: TokenBatch, unit: Unit) -> Measurement:
    reuse = lambda: measure_batch(graph, batch, unit)["values"]  # noqa: E731
    candidates = {"reuse": reuse, "reuse_again": reuse}
    candidates["brute_force"] = partial(without_reuse, graph, batch, unit, whole_model=True)
    candidates["row_by_row"] = partial(without_reuse, graph, batch, unit, whole_model=False)
    matrices = [run() for run in candidates.values()]
    samples = measure(candidates, rounds=ROUNDS, threads=1)
    pairs = [("reuse", other) for other in candidates if other != "reuse"]
    equal = all(torch.equal(matrices[0], other) for other in matrices[1:])
    return Measurement.of({"unit": unit}, samples, pairs, facts={"bit_equal": equal})


def dependency() -> None:
    """The capture, which all need once, is not timed."""
    torch.set_num_threads(1)
    model = load_model()
    (batch,) = read_batches(calibration_batches(BATCH, SEQ, limit=1))
    start = time.perf_counter()
    graph = TracedModel(model).graph(batch.inputs)
    layers = len(graph.blocks.layers)
    results: dict[str, Any] = {"layers": layers, "tokens": BATCH * SEQ, "capture_seconds": time.perf_counter() - start}
    found = [compare(graph, batch, unit) for unit in UNITS]
    print(ratio_table(found, [(name, f"time of {name}") for name in found[0].ratios]))
    # In layers run: one intact run and the layers after each removed one, against L - 1 layers for each row.
    reused, repeated = layers + layers * (layers - 1) / 2, layers + (layers - 1) ** 2
    predictions = {"block": {"reuse/row_by_row": reused / repeated}}
    print("recorded:", record("dependency_speed", results, measurements=found, predictions=predictions).name)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dependency", action="store_true", help="measure the dependency matrix instead")
    if parser.parse_args().dependency:
        dependency()
        return
    compile_seconds(4, True, {})  # warm up Inductor and its workers
    grown = growth()
    results: dict[str, dict[str, Any]] = {
        "fused_32": compile_seconds(32, True, {}),
        "nothing_to_fuse_32": compile_seconds(32, False, {"policy": {"min_members": 2}}),
        "call": call_overhead(),
    }
    rows = [(name, key, value) for name, found in results.items() for key, value in found.items()]
    rows += [("growth", name, found.value) for name, found in grown.ratios.items()]
    print(table(rows, ("what", "figure", "value")))
    print("recorded:", record("pass_time", results, measurements=[grown]).name)


if __name__ == "__main__":
    main()
