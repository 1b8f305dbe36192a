"""The compiler on graphs of other people's models: GraphNet's samples, rebuilt node by node.

    python -m bench.graphnet FOLDER [--limit 900] [--out bench/results/graphnet.json]

FOLDER holds a local copy of `samples/` of github.com/PaddlePaddle/GraphNet. Each sample is rebuilt without running its
code (`bench/graphnet_samples.py`), then goes through the compiler twice:

    as it is           crashes, groups, refusals by code, CPU seconds of fxfusion's own work per 1,000 nodes
    mixers removed     each addition of a token mixer is replaced by its stream, so that the FFNs follow each other

Every group found in either is held against `bench/graphnet_checks.py`: is it *false* (no run of FFNs with nothing
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
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.graphnet_checks import check_group
from bench.graphnet_samples import NotRebuilt, rebuild, samples
from bench.record import Record
from fxfusion.compiler.capture import CapturedGraph
from fxfusion.compiler.pipeline import Analysis, analyse, fuse_captured, normalising_passes
from fxfusion.errors import FxFusionError
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.plan.policy import FusionPolicy

FORMS = ("as it is", "mixers removed")
EVERY = 25  # samples between two writes of the result


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


def analysed(captured: CapturedGraph) -> Analysis:
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
