"""What reusing the prefix saves in a dependency matrix of the reference model.

    python -m bench.dependency_speed

Goal (issue 3): at most 0.6x the time of brute force, in one run. All run the same captured graph on the
same batch and measure the same distances:

    brute force   each row runs the whole model, embedding to logits
    row by row    each row starts at the embedding and stops after the last block; no run for the empty last row
    reuse         each row starts after the removed block: what `dependency_matrix` does

The matrices must agree bit by bit. The capture, which all need once, is not timed.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bench.record import Measurement, record
from bench.reference.load import calibration_batches, load_model
from bench.tables import ratio_table
from bench.timing import measure
from fxfusion.analysis.dependency import Unit, blocks_of, measure_batch
from fxfusion.analysis.token_batches import TokenBatch, read_batches
from fxfusion.analysis.vectors import Directions, block_nodes, contribution, cosine_distance
from fxfusion.models.traced import TracedGraph, TracedModel

BATCH, SEQ, ROUNDS = 2, 256, 5
UNITS: tuple[Unit, ...] = ("ffn", "block")


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
    def reuse() -> Tensor:
        return measure_batch(graph, batch, unit)["values"]

    def brute_force() -> Tensor:
        return without_reuse(graph, batch, unit, whole_model=True)

    def row_by_row() -> Tensor:
        return without_reuse(graph, batch, unit, whole_model=False)

    candidates = {"reuse": reuse, "reuse_again": reuse, "brute_force": brute_force, "row_by_row": row_by_row}
    matrices = [run() for run in candidates.values()]
    samples = measure(candidates, rounds=ROUNDS, threads=1)
    pairs = [("reuse", other) for other in candidates if other != "reuse"]
    equal = all(torch.equal(matrices[0], other) for other in matrices[1:])
    return Measurement.of({"unit": unit}, samples, pairs, facts={"bit_equal": equal})


def main() -> None:
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


if __name__ == "__main__":
    main()
