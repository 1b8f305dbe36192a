"""Fuzz the compiler with random programs, and record what was found.

    python -m bench.fuzz --graphs 20000 --seed 1
    python -m bench.fuzz --graphs 20000 --without-effects

A program is a random stack of blocks with effects between them and inside its FFNs: in-place writes of many spellings,
views, caches, counters, random draws, custom operators, functions that nobody knows. Each goes through `fuse_graph`;
the outputs, the input, the stack's memory and the random state are then compared with those of the parallel form.
Every 25th is compiled instead, and its weights are changed between calls, or it stands inside a transform of functorch
(`bench/fuzz_compiled.py`). A program that was there before in its block does not count.

Without effects: values and gradients of larger stacks; every tenth is also fused twice and held against the path-search
oracle. The result is bench/results/fuzz.json, or fuzz_without_effects.json.

Runs in blocks of 100 programs, each drawn from a seed of its own, and writes the result after each block; the same
command continues where it was stopped.
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
from hypothesis import strategies as st
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.fuzz_compiled import check_compiled
from bench.record import RESULTS, Record
from fxfusion.plan.policy import NormMode
from fxfusion.testing import Block, Effect, Ffn, StackSpec
from fxfusion.testing.checks import check_effects, check_graph, check_oracle, check_twice
from fxfusion.testing.strategies import effect_stacks, stacks

BLOCK = 100
COMPILED = 25  # one program of so many is compiled
_SHRINK_STEPS = 400


def check(spec: StackSpec, number: int, counts: Counter[str]) -> None:
    """All checks of one stack without effects. Raises what the first failing one raises."""
    counts["groups"] += (groups := check_graph(spec, _norm(number)))
    counts["graphs with a group"] += groups > 0
    if number % 10 == 0:
        check_oracle(spec)
        check_twice(spec)
        counts["fused twice and searched for paths"] += 1


def check_with_effects(spec: StackSpec, number: int, counts: Counter[str]) -> None:
    """The check of one program with effects; every 25th is compiled."""
    compiled = number % COMPILED == COMPILED - 1
    if number % (3 * COMPILED) == COMPILED - 1:
        spec = spec.without_effects()  # a transform of functorch takes their place
    counts["groups"] += (groups := check_compiled(spec, number) if compiled else check_effects(spec, _norm(number)))
    counts["graphs with a group"] += groups > 0
    counts["compiled"] += compiled
    counts["transforms of functorch"] += compiled and not spec.has_effects
    counts["effects"] += sum(isinstance(block, Effect) or _acts(block) for block in spec.blocks)
    counts["graphs whose groups are known"] += spec.is_certain


def _norm(number: int) -> NormMode:
    return "last" if number % 3 == 2 else "fold"


def _acts(block: Block) -> bool:
    return isinstance(block, Ffn) and block.acts


def _programs(effects: bool) -> st.SearchStrategy[StackSpec]:
    return effect_stacks() if effects else stacks()


def run_block(
    number: int, block_seed: int, graphs: int, counts: Counter[str], *, effects: bool = True
) -> list[dict[str, Any]]:
    """One block of programs; returns its failures (it goes on after each)."""
    failures: list[dict[str, Any]] = []
    seen: set[StackSpec] = set()

    @seed(block_seed)
    @settings(
        max_examples=3 * graphs,  # hypothesis repeats itself; a program that was there before does not count
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_programs(effects))
    def go(spec: StackSpec) -> None:
        place = number * BLOCK + counts["graphs"]
        if spec in seen or counts["graphs"] == graphs:
            return
        seen.add(spec)
        counts["graphs"] += 1
        counts["blocks"] += len(spec.blocks)
        try:
            (check_with_effects if effects else check)(spec, place, counts)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"[:600]
            failures.append({"seed": block_seed, "number": place, "error": words, "spec": repr(spec)})

    go()
    for failure in failures[:1]:
        failure["shrunken"] = shrink(block_seed, failure["number"], effects)
    return failures


def shrink(block_seed: int, number: int, effects: bool) -> str:
    """The smallest failing program that hypothesis finds from here, as text; empty if it finds none."""

    def fails(spec: StackSpec) -> bool:
        try:
            (check_with_effects if effects else check)(spec, number, Counter())
        except Exception:
            return True
        return False

    try:
        limits = settings(max_examples=_SHRINK_STEPS, database=None, deadline=None)
        return repr(find(_programs(effects), fails, settings=limits, random=random.Random(block_seed)))
    except Exception:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without-effects", action="store_true", help="larger stacks, and their gradients")
    parser.add_argument("--out", type=Path, help="instead of the file in bench/results")
    options = parser.parse_args()
    options.name = "fuzz_without_effects" if options.without_effects else "fuzz"
    options.out = options.out or RESULTS / f"{options.name}.json"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = _load(options.out, options.seed)
    columns = (TextColumn("fuzz"), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=options.graphs, completed=result["counts"].get("graphs", 0))
        while result["counts"].get("graphs", 0) < options.graphs:
            _one_more(result, options)
            done, failed = result["counts"]["graphs"], len(result["failures"])
            progress.update(task, completed=done, description=f"{failed} failures")
    print(json.dumps(result["counts"]), f"{len(result['failures'])} failures")
    return 1 if result["failures"] else 0


def _one_more(result: dict[str, Any], options: argparse.Namespace) -> None:
    number, start = result["blocks_done"], time.process_time()
    counts: Counter[str] = Counter()
    block_seed = options.seed * 1_000_000 + number
    result["failures"] += run_block(number, block_seed, BLOCK, counts, effects=not options.without_effects)
    for key, value in counts.items():
        result["counts"][key] = result["counts"].get(key, 0) + value
    result["cpu_seconds"] = round(result["cpu_seconds"] + time.process_time() - start, 1)
    result["blocks_done"] = number + 1
    complete = result["counts"]["graphs"] >= options.graphs
    Record.of(options.name, results=result, complete=complete).write(options.out)


def _load(path: Path, first_seed: int) -> dict[str, Any]:
    """The earlier result for this seed, or an empty one."""
    if path.exists():
        found = dict(Record.read(path).results)
        if found["seed"] == first_seed:
            return found
    return {"seed": first_seed, "block": BLOCK, "blocks_done": 0, "counts": {}, "cpu_seconds": 0.0, "failures": []}


if __name__ == "__main__":
    sys.exit(main())
