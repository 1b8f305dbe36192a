"""Runs passes in order and keeps every cross-cutting habit out of them.

For each pass: run, erase dead code, lint, check placeholders, output and effects (in their order), ask the pass what
it ensures, record, log, dump. A pass that breaks the graph is a `PassError` with the names of those before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import fx

from fxfusion.errors import PassError
from fxfusion.graph import debug, ops
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.effects import graph_effects
from fxfusion.graph.pass_base import History, Pass, PassRecord


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass], history: History) -> None:
    """Edit `gm.graph` by the passes in order; appends to `history`. Recompiles once, at the end."""
    changed = 0
    for step in passes:
        changed += _run_one(gm, step, history)
    if changed:
        gm.recompile()


def _run_one(gm: fx.GraphModule, step: Pass, history: History) -> int:
    graph = gm.graph
    before = len(graph.nodes)
    interface = _interface(graph)
    if history.check and history.effects is None:
        history.effects = _effects(graph)
    debug.dump_graph(gm, f"{len(history.records):02d}_{step.name}.before")
    start = time.perf_counter()
    try:
        result = step.run(graph)
        erased = erase_dead_code(graph)
        if history.check and (result.changed or erased):
            graph.lint()
    except PassError:
        raise
    except Exception as error:
        raise PassError(f"{step.name} failed{_after(history)}: {type(error).__name__}: {error}") from error
    problems = []
    if history.check:
        problems += [*_interface_changes(interface, _interface(graph)), *step.ensures(graph)]
        if result.changed or erased:
            after = _effects(graph)
            if step.settles and result.changed:
                history.effects = [name for name in history.effects or [] if name in after]
            problems += _effect_changes(history.effects or [], after)
    if problems:
        raise PassError(f"{step.name} broke the graph{_after(history)}: {'; '.join(problems)}")
    seconds = time.perf_counter() - start
    record = PassRecord(step.name, step.exact, result.changed, before, len(graph.nodes), seconds, tuple(result.notes))
    history.records.append(record)
    history.refusals.extend(result.refusals)
    debug.log_pass(record)
    debug.dump_graph(gm, f"{len(history.records) - 1:02d}_{step.name}.after")
    return result.changed + erased


def _effects(graph: fx.Graph) -> list[str]:
    """What the graph does that can be seen from outside, in order."""
    return [node.name for node in graph_effects(graph).observable()]


def _effect_changes(before: list[str], after: list[str]) -> list[str]:
    """Every effect must still be there, in its place."""
    if before == after:
        return []
    gone = [name for name in before if name not in after]
    if gone:
        return [f"effects were lost: {', '.join(gone[:3])}"]
    new = [name for name in after if name not in before]
    return [f"effects came in: {', '.join(new[:3])}" if new else "effects changed places"]


def _after(history: History) -> str:
    names = [record.name for record in history.records]
    return f" after [{', '.join(names)}]" if names else ""


def _interface(graph: fx.Graph) -> tuple[list[str], list[tuple[object, ...]]]:
    """Placeholders that were there, and what the outputs look like."""
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    outputs: list[tuple[object, ...]] = []
    for node in graph.nodes:
        if node.op == "output":
            outputs += map(_looks, ops.nodes_of(node.args))
    return placeholders, outputs


def _looks(node: fx.Node) -> tuple[object, ...]:
    value = ops.tensor_value(node)
    return () if value is None else (ops.shape_of(node), value.dtype, value.device, value.requires_grad)


def _interface_changes(
    before: tuple[list[str], list[tuple[object, ...]]], after: tuple[list[str], list[tuple[object, ...]]]
) -> list[str]:
    problems = []
    if after[0][: len(before[0])] != before[0]:
        problems.append("placeholders were removed or reordered")
    if len(after[1]) != len(before[1]):
        problems.append(f"{len(before[1])} outputs became {len(after[1])}")
    problems += [
        f"output {index} was {old} and is {new}"
        for index, (old, new) in enumerate(zip(before[1], after[1], strict=False))
        if old and new and old != new
    ]
    return problems
