"""The compiler on graphs of other people's models: GraphNet's samples, rebuilt node by node.

    python -m bench.graphnet FOLDER [--limit 900] [--out bench/results/graphnet.json]

FOLDER holds a local copy of `samples/` of github.com/PaddlePaddle/GraphNet. Each sample is rebuilt without running its
code (`bench/graphnet_samples.py`), then goes through the compiler twice:

    as it is           crashes, groups, refusals by code, CPU seconds of fxfusion's own work per 1,000 nodes
    mixers removed     each addition of a token mixer is replaced by its stream, so that the FFNs follow each other

Every group found in either is held against `check_group`, below: is it *false* (no run of FFNs with nothing
between them), is it *wrong* (the fused form is not the parallel form). A crash is any exception that is not fxfusion's
own; what was found before it in the graph does not count. What cannot be rebuilt is counted by reason. The same command
continues where it was stopped, and measures graphs that crashed again.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, fx

from bench.graphnet_samples import NotRebuilt, rebuild, samples
from bench.record import Record
from fxfusion.compiler.capture import CapturedGraph
from fxfusion.compiler.pipeline import GraphAnalysis, analyse, fuse_captured, normalising_passes
from fxfusion.errors import FxFusionError
from fxfusion.graph import ops
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.graph.torch_private import size_hint
from fxfusion.passes.ffn import Group
from fxfusion.plan.policy import FusionPolicy
from fxfusion.testing import straddles
from fxfusion.testing.checks import TOLERANCE, relative_error

FORMS = ("as it is", "mixers removed")
EVERY = 25  # samples between two writes of the result
MOST_BYTES = 2**30  # of the random weights of one group
MOST_PRODUCTS = 3 * 10**9  # weights times tokens of one group
MOST_OF_TWO = 10**10  # the same, where only two members are left


def measure(sample: Path, found: dict[str, Any], folder: Path) -> None:
    """Add what one sample, below the folder, shows to `found`."""
    name = sample.relative_to(folder).as_posix()
    try:
        captured = rebuild(sample)
    except NotRebuilt as reason:
        _count(found["not_rebuilt"], str(reason))
        return
    found["graphs"] += 1
    found["nodes"] += len(captured.module.graph.nodes)
    for what in FORMS:
        _measure_form(what, captured, found, name)


def _measure_form(what: str, captured: CapturedGraph, found: dict[str, Any], name: str) -> None:
    form = copy.deepcopy(found[what])
    try:
        graph = captured if what == "as it is" else without_mixers(captured)
        if graph is not None:
            _one_form(graph, form, name)
        found[what] = form
    except Exception as error:
        kind = "coded_errors" if isinstance(error, FxFusionError) else "crashes"
        found[kind].append({"graph": name, "form": what, "error": f"{type(error).__name__}: {error}"[:600]})


def _crashed_again(found: dict[str, Any], folder: Path) -> None:
    """Measure what crashed before once more: the cause may have been mended since."""
    before, found["crashes"] = found["crashes"], []
    for crash in before:
        _measure_form(crash["form"], rebuild(folder / crash["graph"]), found, crash["graph"])


def _one_form(captured: CapturedGraph, into: dict[str, Any], name: str) -> None:
    gc.collect()  # what rebuilding the graph left behind is not this one's
    nodes, start = len(captured.module.graph.nodes), time.process_time()
    report = fuse_captured(captured, FusionPolicy()).report
    seconds = time.process_time() - start
    into["graphs"] += 1
    into["nodes"] += nodes
    into["cpu_seconds"] += seconds
    into["groups"] += len(report.groups)
    into["graphs_with_a_group"] += bool(report.groups)
    into["slowest"] = max(into["slowest"], [round(1000 * seconds / nodes, 4), name, nodes])
    for refusal in report.refusals:
        _count(into["refusals"], refusal.code.value)
    if not report.groups:
        return
    groups = analysed(captured).groups
    if [len(group.members) for group in groups] != [len(group.members) for group in report.groups]:
        raise RuntimeError("the analysis found other groups than the fusion")
    for number, group in enumerate(groups):
        one = check_group(group, captured.weights)
        into["groups_run"] += one.error is not None
        into["groups_too_large"] += one.error is None and not (one.false or one.wrong)
        into["members"] += one.members
        into["members_run"] += one.run
        into["largest_error"] = max(into["largest_error"], one.error or 0.0)
        for kind, words in (("false", one.false), ("wrong", one.wrong)):
            if words:
                into[kind].append({"graph": name, "group": number, "why": words})


def analysed(captured: CapturedGraph) -> GraphAnalysis:
    """What is found in a normalised copy of the graph."""
    work = captured.copy()
    run_passes(work.module, normalising_passes(work.weights), History())
    return analyse(work, FusionPolicy())


def without_mixers(captured: CapturedGraph) -> CapturedGraph | None:
    """A copy whose token mixers are gone from the residual stream; None where it has none."""
    work = captured.copy()
    run_passes(work.module, normalising_passes(work.weights), History())
    mixers = analyse(work, FusionPolicy()).matches.mixers
    for mixer in reversed(mixers):
        mixer.add.replace_all_uses_with(mixer.stream)
    erase_dead_code(work.module.graph)
    return work if mixers else None


def empty() -> dict[str, Any]:
    form = {"graphs": 0, "nodes": 0, "cpu_seconds": 0.0, "groups": 0, "graphs_with_a_group": 0, "members": 0}
    form |= {"groups_run": 0, "groups_too_large": 0, "members_run": 0, "largest_error": 0.0}
    return {
        "samples_done": 0,
        "graphs": 0,
        "nodes": 0,
        "not_rebuilt": {},
        "crashes": [],
        "coded_errors": [],
        **{what: {**form, "slowest": [0.0, "", 0], "refusals": {}, "false": [], "wrong": []} for what in FORMS},
    }


def _count(into: dict[str, int], key: str) -> None:
    into[key] = into.get(key, 0) + 1


def _load(path: Path, of: int) -> dict[str, Any]:
    """The earlier result over as many samples, or an empty one."""
    if path.exists():
        found = dict(Record.read(path).results)
        if found.get("samples") == of:
            return found
    return {"samples": of, **empty()}


def _write(found: dict[str, Any], path: Path, complete: bool) -> None:
    for what in FORMS:
        form = found[what]
        form["cpu_seconds"] = round(form["cpu_seconds"], 3)
        form["cpu_seconds_per_1000_nodes"] = round(1000 * form["cpu_seconds"] / max(form["nodes"], 1), 4)
        form["refusals"] = dict(Counter(form["refusals"]).most_common())
    found["not_rebuilt"] = dict(Counter(found["not_rebuilt"]).most_common())
    Record.of("graphnet", results=found, complete=complete).write(path)


# --- the checks ----------------------------------------------------------------------------------------
#
# What is checked of a fused group of a foreign graph, without code of the matchers and rewriters.
#
# A group is *false* when one of these holds in the graph that it was found in; the first by searching paths, the others
# by computing with random weights in float64:
#
#     read from outside    a value between the group's input and its end is read elsewhere, or read from elsewhere
#     no sum               the end is not the input plus the branches, each computed at the stream it reads
#     mixes tokens         another value in one token of the stream changes a branch at other tokens
#
# A group is *wrong* when what the compiler makes of it differs from its parallel form, in which each branch reads the
# group's input, by more than 1e-10 of the largest value.


@dataclass(frozen=True, slots=True)
class Found:
    """What was found about one group. `run`: how many of its first members were computed here; as many as fit.

    `error`: relative, of the fused against the parallel form; None where not even two members fit. `false`, `wrong`:
    why, in words; empty where all is well.
    """

    members: int
    run: int = 0
    error: float | None = None
    false: str = ""
    wrong: str = ""


def check_group(group: Group, weights: frozenset[str]) -> Found:
    """All checks of one group, on a copy of its part of the graph, with random values. The graph is not changed."""
    stream, end, size = group.members[0].stream, group.members[-1].add, len(group.members)
    outside = straddles(stream, end, lambda node: False)
    if outside is not None:
        return Found(size, false=f"read from outside: {outside}")
    region = _region_that_fits(group, weights)
    if region is None:
        return Found(size)
    run, values = len(region.adds), region.random_values()
    x = values[0]
    try:
        branches = region.sequential(values)
    except Exception as error:
        return Found(size, run, wrong=f"the region does not run in float64: {type(error).__name__}: {error}"[:300])
    if relative_error(branches[-1], x + sum(branches[:-1], torch.zeros_like(x))) > TOLERANCE:
        return Found(size, run, false="no sum: the end is not the input plus the branches")
    if region.mixes_tokens(values):
        return Found(size, run, false="mixes tokens: a branch at one token depends on another token")
    want = region.parallel(values)
    got, problem = region.fused(values)
    if got is None:
        return Found(size, run, wrong=problem)
    error = relative_error(got, want)
    return Found(size, run, error, wrong=f"off by {error:.3g}" if error > TOLERANCE else "")


def _region_that_fits(group: Group, weights: frozenset[str]) -> Region | None:
    """As many of the group's first members as can be computed here; None where that is fewer than two."""
    region = Region(group, weights)
    while not region.fits and len(group.members) > 2:
        group = replace(group, members=group.members[: max(len(group.members) // 2, 2)])
        region = Region(group, weights)
    return region if region.fits else None


class Region:
    """The part of a graph from a group's input to its end, as a graph of its own.

    Inputs are the stream, then whatever else is needed that the graph was given or makes from nothing.
    """

    def __init__(self, group: Group, weights: frozenset[str]) -> None:
        self.graph = fx.Graph()
        self.leaves: list[fx.Node] = [group.members[0].stream]
        self.copies = {self.leaves[0]: self.graph.placeholder("stream")}
        end = group.members[-1].add
        for node in _needed(end, self.leaves[0]):
            if node.op == "placeholder" or ops.is_shape_value(node):
                self._leaf(node)
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
                self.copies[node].meta = dict(node.meta)
        self.copies[self.leaves[0]].meta = dict(self.leaves[0].meta)
        self.adds = [self.copies[member.add] for member in group.members]
        self.streams = [self.copies[member.stream] for member in group.members]
        self.branches = [self.copies[member.branch] for member in group.members]
        self.graph.output((*self.branches, self.adds[-1]))
        self.weights = weights
        self.norm = group.norm

    def _leaf(self, node: fx.Node) -> None:
        value = _example(node)
        if not ops.is_shape_value(node):
            self.copies[node] = self.graph.placeholder(node.name)
            self.copies[node].meta = dict(node.meta)
            self.leaves.append(node)
        else:
            self.copies[node] = _plain(value)  # type: ignore[assignment]  # a size, written out

    @property
    def fits(self) -> bool:
        most = MOST_OF_TWO if len(self.adds) == 2 else MOST_PRODUCTS
        return self.bytes <= MOST_BYTES and self.bytes // 8 * self.tokens <= most

    @property
    def bytes(self) -> int:
        return sum(8 * _example(node).numel() for node in self.leaves)

    @property
    def tokens(self) -> int:
        value = _example(self.leaves[0])
        return int(value.numel() // value.shape[-1])

    def random_values(self) -> list[Tensor]:
        """The stream, `[..., hidden]`, and the weights, small enough that no activation saturates, and variances, which
        are positive; float64."""
        generator = torch.Generator().manual_seed(0)
        values = []
        for node in self.leaves:
            example = _example(node)
            shape = [size_hint(size) for size in example.shape]
            if not example.is_floating_point():
                values.append(torch.zeros(shape, dtype=example.dtype))
                continue
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if _is_under_root(node):
                value = value.abs()
            values.append(value / shape[-1] ** 0.5 if len(shape) > 1 and node is not self.leaves[0] else value)
        return values

    def sequential(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The branches as the graph computes them, and the end."""
        return list(_InFloat64(torch.nn.Module(), graph=self.graph).run(*values))

    def mixes_tokens(self, values: Sequence[Tensor]) -> bool:
        """Whether the end at other tokens changes when the first token of the stream does."""
        if self.tokens == 1:
            return False
        before = self.sequential(values)[-1]
        moved = values[0].clone()
        first = (0,) * (moved.dim() - 1)
        moved[first] = moved[first] + 1.0
        after = self.sequential([moved, *values[1:]])[-1]
        rows = (after - before).reshape(-1, before.shape[-1])
        return float(rows[1:].abs().max()) > TOLERANCE * float(before.abs().max())

    def parallel(self, values: Sequence[Tensor]) -> Tensor:
        """The end where every branch reads the group's input."""
        copy = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = copy.graph_copy(self.graph, copies)
        copy.output(result)
        for stream, add in zip(self.streams[1:], self.adds[1:], strict=True):
            for user in list(copies[stream].users):
                if user is not copies[add] and user.op != "output":
                    user.replace_input_with(copies[stream], copies[self.streams[0]])
        outputs = _InFloat64(torch.nn.Module(), graph=copy).run(*values)
        found: Tensor = outputs[-1]
        return found

    def fused(self, values: Sequence[Tensor]) -> tuple[Tensor | None, str]:
        """What the compiler makes of the region, run; or None and why not."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, copies)
        graph.output(copies[self.adds[-1]])
        graph.eliminate_dead_code()
        held = frozenset(node.name for node in self.leaves[1:] if node.name in self.weights)
        inputs = tuple(copies[self.copies[node]].meta["example_value"] for node in self.leaves)
        captured = CapturedGraph(
            module=fx.GraphModule(torch.nn.Module(), graph),
            inputs=inputs,
            weights=held,
            values={node.name: _example(node) for node in self.leaves if node.name in held},
        )
        fused = fuse_captured(captured, FusionPolicy(norm=self.norm), lift_into=None)
        groups = [len(group.members) for group in fused.report.groups]
        if groups != [len(self.adds)]:
            return None, f"alone, the group of {len(self.adds)} is fused as {groups}"
        found: Tensor = _InFloat64(fused.module, graph=fused.module.graph).run(*values)
        return found, ""


class _InFloat64(fx.Interpreter):
    """Runs a graph with every float in float64, whatever casts it holds."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, _wide(args), {name: _wide(value) for name, value in kwargs.items()})

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in ("float", "half", "bfloat16"):
            target = "double"
        return super().call_method(target, _wide(args), {name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return tuple(map(_wide, value)) if isinstance(value, tuple) else value


def _is_under_root(node: fx.Node) -> bool:
    """Whether it is a variance: what is added to it goes under a root."""
    readers = {ops.op_name(reader) for user in node.users for reader in (user, *user.users)}
    return ops.tensor_value(node) is not None and not readers.isdisjoint(("rsqrt", "sqrt"))


def _needed(end: fx.Node, stream: fx.Node) -> list[fx.Node]:
    """What the end needs besides the stream, in graph order."""
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node is not stream and node not in found:
            found.add(node)
            if not ops.is_shape_value(node):
                pending.extend(node.all_input_nodes)
    return [node for node in stream.graph.nodes if node in found]


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value if isinstance(value, (float, bool, torch.dtype, torch.device)) else size_hint(value)


# --- the command ---------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a copy of GraphNet's samples/")
    parser.add_argument("--limit", type=int, help="stop after so many samples; evenly spread over the folder")
    parser.add_argument("--out", type=Path, default=Path("bench/results/graphnet.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through for each graph
    try:
        folders = samples(options.folder)
    except ValueError as error:
        parser.error(str(error))
    if options.limit and options.limit < len(folders):
        folders = [folders[place * len(folders) // options.limit] for place in range(options.limit)]
    found = _load(options.out, len(folders))
    columns = (TextColumn("graphnet"), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    _crashed_again(found, options.folder)
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(folders), completed=found["samples_done"])
        while found["samples_done"] < len(folders):
            sample = folders[found["samples_done"]]
            progress.update(task, description=sample.name[:40])
            measure(sample, found, options.folder)
            found["samples_done"] += 1
            progress.advance(task)
            done = found["samples_done"] == len(folders)
            if done or found["samples_done"] % EVERY == 0:
                _write(found, options.out, done)
    print(_summary(found))
    return 1 if _failures(found) else 0


def _failures(found: dict[str, Any]) -> int:
    forms = [found["as it is"], found["mixers removed"]]
    return len(found["crashes"]) + sum(len(form["false"]) + len(form["wrong"]) for form in forms)


def _summary(found: dict[str, Any]) -> str:
    lines = [
        f"{found['graphs']} graphs of {found['nodes']:,} nodes, {sum(found['not_rebuilt'].values())} not rebuilt, "
        f"{len(found['crashes'])} crashes, {len(found['coded_errors'])} errors of fxfusion's own"
    ]
    for what in FORMS:
        form = found[what]
        lines.append(
            f"{what}: {form['groups']} groups in {form['graphs_with_a_group']} of {form['graphs']} graphs, "
            f"{form['groups_run']} run (largest error {form['largest_error']:.2g}), {len(form['wrong'])} wrong, "
            f"{len(form['false'])} false, {form['cpu_seconds_per_1000_nodes']} CPU s per 1,000 nodes"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
