"""Fuzz the compiler with random stacks, and record what was found.

    python -m bench.fuzz --graphs 20000 --seed 1 --out bench/results/fuzz.json

Runs in blocks of 100 graphs, each drawn from a seed of its own, and writes the result after each block;
the same command continues where it was stopped. Every graph goes through `fuse_graph` and is compared
with its ground truth; every tenth is also fused twice and held against the path-search oracle.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.record import Record
from fxfusion.testing import StackSpec
from fxfusion.testing.checks import check_graph, check_oracle, check_twice
from fxfusion.testing.strategies import stacks

BLOCK = 100
_SHRINK_STEPS = 400


def check(spec: StackSpec, number: int, counts: Counter[str]) -> None:
    """All checks of one graph. Raises what the first failing one raises."""
    norm = "last" if number % 3 == 2 else "fold"
    groups = check_graph(spec, norm)
    counts["graphs"] += 1
    counts["groups"] += groups
    counts["graphs with a group"] += groups > 0
    counts["blocks"] += len(spec.blocks)
    if number % 10 == 0:
        check_oracle(spec)
        check_twice(spec)
        counts["fused twice and searched for paths"] += 1


def run_block(number: int, block_seed: int, graphs: int, counts: Counter[str]) -> list[dict[str, Any]]:
    """One block of graphs; returns its failures (it goes on after each)."""
    failures: list[dict[str, Any]] = []

    @seed(block_seed)
    @settings(
        max_examples=graphs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(stacks())
    def go(spec: StackSpec) -> None:
        place = number * BLOCK + counts["drawn"] % BLOCK
        counts["drawn"] += 1
        try:
            check(spec, place, counts)
        except Exception as error:
            failures.append({"seed": block_seed, "error": f"{type(error).__name__}: {error}"[:600], "spec": repr(spec)})

    go()
    for failure in failures[:1]:
        failure["shrunken"] = shrink(block_seed)
    return failures


def shrink(block_seed: int) -> str:
    """The smallest failing stack that hypothesis finds from here, as text; empty if it finds none."""

    def fails(spec: StackSpec) -> bool:
        try:
            check(spec, 0, Counter())
        except Exception:
            return True
        return False

    try:
        limits = settings(max_examples=_SHRINK_STEPS, database=None, deadline=None)
        return repr(find(stacks(), fails, settings=limits, random=random.Random(block_seed)))
    except Exception:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/fuzz.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = _load(options.out, options.seed)
    blocks = -(-options.graphs // BLOCK)
    columns = (TextColumn("fuzz"), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=blocks * BLOCK, completed=result["blocks_done"] * BLOCK)
        while result["blocks_done"] < blocks:
            _one_more(result, options)
            progress.update(task, advance=BLOCK, description=f"{len(result['failures'])} failures")
    print(json.dumps(result["counts"]), f"{len(result['failures'])} failures")
    return 1 if result["failures"] else 0


def _one_more(result: dict[str, Any], options: argparse.Namespace) -> None:
    number, start = result["blocks_done"], time.process_time()
    counts: Counter[str] = Counter()
    result["failures"] += run_block(number, options.seed * 1_000_000 + number, BLOCK, counts)
    for key, value in counts.items():
        result["counts"][key] = result["counts"].get(key, 0) + value
    result["cpu_seconds"] = round(result["cpu_seconds"] + time.process_time() - start, 1)
    result["blocks_done"] = number + 1
    complete = result["blocks_done"] * BLOCK >= options.graphs
    Record.of("fuzz", results=result, complete=complete).write(options.out)


def _load(path: Path, first_seed: int) -> dict[str, Any]:
    """The earlier result for this seed, or an empty one."""
    if path.exists():
        found = dict(Record.read(path).results)
        if found["seed"] == first_seed:
            return found
    return {"seed": first_seed, "block": BLOCK, "blocks_done": 0, "counts": {}, "cpu_seconds": 0.0, "failures": []}


if __name__ == "__main__":
    sys.exit(main())
