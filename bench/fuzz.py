"""Fuzz the compiler with random programs, and record what was found.

    python -m bench.fuzz --graphs 20000 --seed 1
    python -m bench.fuzz --graphs 20000 --without-effects

A program is a random stack of blocks with effects between them and inside its FFNs: in-place writes of many spellings,
views, caches, counters, random draws, custom operators, functions that nobody knows. Each goes through `fuse_graph`;
the outputs, the input, the stack's memory and the random state are then compared with those of the parallel form.
Every 25th is compiled instead, and its weights are changed between calls, or it stands inside a transform of functorch
(`check_compiled`). A program that was there before in its block does not count.

Without effects: values and gradients of larger stacks; every tenth is also fused twice and held against the path-search
oracle. The result is bench/results/fuzz.json, or fuzz_without_effects.json.

Runs in blocks of 100 programs, each drawn from a seed of its own, and writes the result after each block; the same
command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fxfusion
from bench.record import RESULTS, Record
from fxfusion.backend import forget_reports, last_reports
from fxfusion.graph.torch_private import reset_dynamo
from fxfusion.plan.policy import NormMode
from fxfusion.testing import Block, Effect, Ffn, Stack, StackSpec
from fxfusion.testing.checks import (
    TOLERANCE,
    check_effects,
    check_graph,
    check_oracle,
    check_outcome,
    check_twice,
    relative_error,
)
from fxfusion.testing.strategies import effect_stacks, stacks

BLOCK = 100
COMPILED = 25  # one program of so many is compiled
_SHRINK_STEPS = 400
Write = Callable[[Stack], None]


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


# --- compiled ------------------------------------------------------------------------------------------
#
# Random stacks through `torch.compile`: what is written between calls, and transforms around the stack.
#
# The graph that fxfusion made is run as it is (`compiler="eager"`), so a program takes a fraction of a second, and its
# weights are packed and kept fresh as they are for any other compiler. What is right is the parallel form of the groups
# that were fused, in eager, on the weights as they are at that call.


def check_compiled(given: StackSpec, number: int) -> int:
    """Two changes of weights between three calls, in inference; without effects, a transform of functorch.

    Returns the number of groups fused. Raises `AssertionError` where an outcome is wrong.
    """
    draw = random.Random(number)
    reset_dynamo()
    forget_reports()
    model = Stack(given)
    if not given.has_effects:
        model.requires_grad_(draw.random() < 0.5)
        return _check_transform(model, draw.choice(sorted(TRANSFORMS)))
    x = model.example()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})
    with torch.no_grad():
        _first_call(model, compiled, x)
        groups = model.numbered(_groups_found())
        for name in (None, *draw.sample(sorted(WRITES), 2)):
            if name is not None:
                _apply(WRITES[name], model)
            try:
                check_outcome(model, x, compiled, lambda y: model.parallel_forward(y, groups))
            except AssertionError as error:
                raise AssertionError(f"after {name or 'compiling'}: {error}") from error
    return len(groups)


def _first_call(model: Stack, compiled: Callable[[Tensor], object], x: Tensor) -> None:
    """Compile, and leave the memory as it was."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    compiled(x.clone())
    for name, value in model.named_buffers():
        value.copy_(before[name])


def _apply(write: Write, model: Stack) -> None:
    """Write the weights only: the memory of the stack stays as it is."""
    torch.manual_seed(model.given.seed + 2)
    if any(True for _ in model.parameters()):
        write(model)


def _groups_found() -> list[list[str]]:
    names = [[member.name for member in group.members] for report in last_reports() for group in report.groups]
    found = [[re.search(r"blocks\.\d+", name) for name in group] for group in names]
    return [[match[0] if match else "" for match in group] for group in found]


def _optimizer(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Write:
    def step(model: Stack) -> None:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        make(parameters).step()
        for parameter in parameters:
            parameter.grad = None

    return step


def _each(write: Callable[[nn.Parameter, Tensor], object]) -> Write:
    """A write of every parameter, towards other values of its shape."""

    def all_of_them(model: Stack) -> None:
        for parameter in model.parameters():
            write(parameter, torch.randn_like(parameter) * 0.5)

    return all_of_them


def _set_data(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value


def _low_rank(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.dim() == 2:
        parameter.data += value[:, :1] @ torch.randn(1, parameter.shape[1], dtype=parameter.dtype)


def _by_numpy(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.detach().numpy()[...] = value.numpy()


def _others(model: Stack) -> dict[str, Tensor]:
    weights = {name for name, _ in model.named_parameters()}
    return {
        name: torch.randn_like(value) * 0.5 if name in weights else value.clone()
        for name, value in model.state_dict().items()
    }


def _replace_parameters(model: Stack) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn_like(parameter) * 0.5))


WRITES: dict[str, Write] = {
    "SGD": _optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "SGD, fused": _optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True)),
    "AdamW, one by one": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False)),
    "AdamW, foreach": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True)),
    "AdamW, fused": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True)),
    "a merged adapter": _each(_low_rank),
    "add_": _each(lambda parameter, value: parameter.add_(value)),
    "copy_": _each(lambda parameter, value: parameter.copy_(value)),
    "copy_ through data": _each(lambda parameter, value: parameter.data.copy_(value)),
    "new data": _each(_set_data),
    "set_": _each(lambda parameter, value: parameter.set_(value)),
    "one value": _each(lambda parameter, value: parameter.view(-1)[:1].fill_(0.25)),
    "numpy": _each(_by_numpy),
    "foreach": lambda model: torch._foreach_mul_(list(model.parameters()), 0.5),
    "load_state_dict": lambda model: model.load_state_dict(_others(model)) and None,
    "load_state_dict, assigned": lambda model: model.load_state_dict(_others(model), assign=True) and None,
    "new parameters": _replace_parameters,
}
"""Ways to change weights between two calls."""


def _grad(of: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    return (torch.func.grad(lambda y: sum((out.square().sum() for out in of(y)), y.new_zeros(())))(x),)


def _vmap(of: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    return torch.func.vmap(of)(torch.stack([x, 2 * x, x - 1]))


def _jvp(of: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    values, directions = torch.func.jvp(of, (x,), (torch.ones_like(x),))
    return (*values, *directions)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Sequence[Tensor]], Tensor], Sequence[Tensor]]] = {
    "grad": _grad,
    "vmap": _vmap,
    "jvp": _jvp,
}


def _check_transform(model: Stack, name: str) -> int:
    """The transform of the stack, compiled, is the transform of the parallel form.

    What Dynamo cannot trace without fxfusion either (jvp through a layer norm, in torch 2.13) counts as nothing fused.
    """
    transform, x = TRANSFORMS[name], model.example()
    of_model = lambda y: transform(model, y)  # noqa: E731
    try:
        got = torch.compile(of_model, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})(x)
    except Exception:
        reset_dynamo()
        try:
            torch.compile(of_model, backend="eager")(x)
        except Exception:
            return 0
        raise
    groups = model.numbered(_groups_found())
    want = transform(lambda y: model.parallel_forward(y, groups), x)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        error = relative_error(one, other)
        assert error <= 2 * TOLERANCE, f"{name}: output {index} is off by {error:.3g}"
    return len(groups)


# --- the command ---------------------------------------------------------------------------------------


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
