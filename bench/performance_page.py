"""docs/performance.md and its figures, from bench/results/*.json alone, so that no number can drift.

    python -m bench.performance_page

A test compares the page with what this makes of the recorded files. Sentences that judge are made from the numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.performance_plots import figures, growth
from bench.record import RESULTS, Measurement, Record
from bench.tables import bytes_, ratio_table, seconds, table, times

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    (DOCS / "performance.md").write_text(page(), "utf-8")
    print("written:", *(path.name for path in figures(DOCS / "figures")), "performance.md")


def page() -> str:
    """The whole text."""
    parts = [introduction(), chains(), grid(), whole_models(), gpu(), scale()]
    optional = {"memory": memory, "check": guard}
    for name, part in optional.items():
        there = (RESULTS / f"{name}.json").exists()
        parts.append(part() if there else f"## {name.capitalize()}\n\nNot recorded yet: `python -m bench.{name}`.")
    return "\n\n".join(part.strip() for part in [*parts, reading()]) + "\n"


def introduction() -> str:
    return f"""
# Performance

Made by `python -m bench.performance_page` from `bench/results/*.json`; a test fails where the two differ. Renew the
files with `make bench` (CPU) and `python -m bench.gpu` (one GPU), see [below](#reading-and-repeating).

{no_gpu()}

Ratios are geometric means over rounds in which every candidate ran once, in an order drawn anew, with a 95 % bootstrap
interval; above 1 the second one is faster. Each table has an A/A control: two copies of the unfused form. Where its
interval is wide or lies off 1, the machine was busy, and a difference of that size means nothing. What fusing gains on
hardware that nobody here has is estimated by the cost model, `fxfusion simulate` ([cost.md](cost.md)), not measured.
"""


def no_gpu() -> str:
    if (RESULTS / "gpu.json").exists():
        return f"The GPU's part ran on {Record.read('gpu').machine.gpu}."
    return (
        "**Nothing on this page was measured on a GPU.** Of `python -m bench.gpu` only the parts ran, on a CPU, tiny; "
        "the goals for GPUs are open."
    )


def where(record: Record) -> str:
    """The line below a heading: what ran where."""
    machine = record.machine
    parts = [machine.gpu or machine.processor or "processor not recorded", f"torch {record.versions.get('torch', '?')}"]
    parts += [f"threads {machine.threads}", record.date, f"`{record.command}`"]
    loads = machine.load_average
    return ", ".join(parts) + (f", load {loads[0]:.1f}" if loads else "") + "."


def columns(found: Iterable[Measurement]) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for one in found for name in one.ratios)
    return [(name, "A/A" if "again" in name else name.replace("/", " / ").replace("_", " ")) for name in names]


def gain(values: Iterable[float]) -> str:
    return f"{statistics.geometric_mean(list(values)):.2f}x"


def chains() -> str:
    record = Record.read("chain_speed")
    found = record.measurements
    gains = [one.ratios["unfused/fused"] for one in found]
    better, worse = (sum(test(one) for one in gains) for test in (lambda one: one.low > 1, lambda one: one.high < 1))
    return f"""
## Chains of FFNs on the CPU

{where(record)}

Over {len(found)} cells the fused chain is {gain(one.value for one in gains)} as fast as the unfused one. By the
intervals it is faster in {better}, slower in {worse}, and neither in {len(found) - better - worse}.

{ratio_table(found, columns(found), markdown=True)}
"""


def grid() -> str:
    record = Record.read("grid")
    found = record.measurements
    limits = record.results["limits"]
    bandwidth = limits["bandwidth_bytes_per_second"]
    names = [name for name in found[0].samples if "again" not in name]
    rows = [
        (*one.place.values(), *(f"{float(one.facts[f'share of limit, {name}'] or 0):.0%}" for name in names))
        for one in found
    ]
    rates = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in limits["operations_per_second"].items())
    fused = [one.ratios["unfused/fused"].value for one in found]
    naive = [one.ratios["concatenated by call/fused"].value for one in found]
    surgery = [one.ratios["surgery/fused"].value for one in found]
    return f"""
## Real shapes, against what else one could do

{where(record)} {left_out(record)}

All forms hold the same weights. *eager*: the modules as they are. *unfused*: `torch.compile`. *fused*: the backend.
*surgery*: `fuse`, then plain `torch.compile`. *concatenated by call*: the wide weights made inside the graph, at each
call. Each form's output is compared with the form that it must equal before it is timed.

{ratio_table(found, columns(found), markdown=True)}

Unfused over fused {gain(fused)}; surgery over fused {gain(surgery)}, which compute the same wide FFN (the backend also
looks at each call whether a weight has changed). Concatenating at each call takes {gain(naive)} the time: it reads and
writes every weight once more. Packing once is what makes fusing worth anything.

How far from the limit, the time in which the weights can be read ({bandwidth / 1e9:.1f} GB/s, the best of a sum and two
matrix-vector products over memory that was written) or the products computed ({rates}), whichever is longer. On shared
cores the measured limit moves too, so shares above 100 % happen:

{table(rows, [*found[0].place, *names], markdown=True)}

![share of the limit](figures/share_of_limit.svg)
"""


def whole_models() -> str:
    record = Record.read("whole_models")
    found = record.measurements
    names = ("unfused", "fused", "surgery")
    rows = [
        (*one.place.values(), *(f"{float(one.facts[f'tokens_per_second, {name}'] or 0):.3g}" for name in names))
        + tuple(seconds(float(one.facts[f"first call, {name}"] or 0)) for name in names)
        + tuple(bytes_(float(one.facts[f"peak bytes more, {name}"] or 0)) for name in names)
        for one in found
    ]
    heads = [f"{what}, {name}" for what in ("tokens/s", "first call", "memory more") for name in names]
    compiles = [
        float(one.facts["first call, unfused"] or 0) / float(one.facts["first call, fused"] or 1) for one in found
    ]
    return f"""
## Whole models

{where(record)} {left_out(record)}

Half of the layers of the 1B shape (random weights) and five of the reference model have no attention, in all forms.
Decoding uses a static cache. Tokens per second are of this shared machine and moment; only the ratios carry over.

{ratio_table(found, columns(found), markdown=True)}

{table(rows, [*found[0].place, *heads], markdown=True)}

*First call* is the compile, from an empty Inductor cache, and one run: {gain(compiles)} as fast fused as unfused.
*Memory more* is the peak above what was there before the first call: the compiler's own, and for the backend the packed
weights.
"""


def gpu() -> str:
    if not (RESULTS / "gpu.json").exists():
        return """## GPU

Not run: no GPU was at hand. A slow test runs the script on the CPU with tiny shapes (`tests/bench/test_gpu.py`); CUDA
graphs, Triton's templates and GPU memory figures are untested. Predictions, written down before any run, are in
`bench/gpu.py`.
"""
    record = Record.read("gpu")
    chains_, models = ([one for one in record.measurements if key in one.place] for key in ("members", "phase"))
    tables = [ratio_table(found, columns(found), markdown=True) for found in (chains_, models) if found]
    return "\n\n".join([f"## GPU\n\n{where(record)} {left_out(record)}", *tables])


def scale() -> str:
    record = Record.read("scale")
    whole = [one for one in record.measurements if one.place["what"] == "whole"]
    steps = ("capture", "fxfusion", "plan", "dry-run export", "all")
    rows = [
        (one.place["model"], one.facts["nodes"], one.facts["nodes_after"], *(_median(one, name) for name in steps))
        + (bytes_(float(one.facts["peak_bytes"] or 0)),)
        for one in whole
    ]
    return f"""
## The compiler itself

{where(record)} {left_out(record)}

Models without weights, each in a process of its own, on one thread: captured by Dynamo, matched, planned and rewritten
(*fxfusion*), and written dry in the nemotron-nas layout. The goal was 60 s and 4 GB for each.

{table(rows, ["model", "nodes", "nodes after", *steps, "peak memory"], markdown=True)}

{growth_part(growth(record))}

{compile_part([one for one in record.measurements if one.place["what"] == "compile"])}
"""


def growth_part(grown: Sequence[Measurement]) -> str:
    if len(grown) < 2:
        return "How time grows with the layers was not measured."
    rows = [
        (one.place["layers"], one.facts["nodes"], _median(one, "capture"), _median(one, "fxfusion"))
        + (f"{one.medians['fxfusion'].value / float(one.facts['nodes'] or 1) * 1e6:.0f} us",)
        + (bytes_(float(one.facts["peak_bytes"] or 0)),)
        for one in grown
    ]
    first, last = grown[0], grown[-1]
    layers = float(last.place["layers"] or 0) / float(first.place["layers"] or 1)
    ours, captured = (last.medians[name].value / first.medians[name].value for name in ("fxfusion", "capture"))
    return f"""
With the layers (five of each eight without attention), {layers:.0f} times as many layers take {captured:.1f} times the
capture and {ours:.1f} times fxfusion's own time:

{table(rows, ["layers", "nodes", "capture", "fxfusion", "per node", "peak memory"], markdown=True)}

![growth with the layers](figures/scale.svg)
""".strip()


def compile_part(compiled: Sequence[Measurement]) -> str:
    return "\n\n".join(
        f"Inductor compiles a decoder of {one.place['layers']} layers in {_median(one, 'fused')} fused and "
        f"{_median(one, 'unfused')} unfused: {times(one.ratios['unfused/fused'])} as fast."
        for one in compiled
    )


def memory() -> str:
    record = Record.read("memory")
    rows = [
        (one.place["route"], bytes_(float(one.facts["model_bytes"] or 0)), bytes_(float(one.facts["group_bytes"] or 0)))
        + tuple(
            bytes_(one.medians[name].value) if name in one.medians else None for name in ("peak", "after", "recompiled")
        )
        for one in record.measurements
    ]
    return f"""
## Memory

{where(record)}

What is resident beyond the model, in a process of its own. The backend keeps the members, as the module still holds
them, and adds one packed copy of the fused groups' weights, however many graphs are compiled. `fuse` frees the members
group by group, so that it never holds more than one group twice.

{table(rows, ["route", "model", "fused groups", "peak more", "after", "after two recompiles"], markdown=True)}
"""


def guard() -> str:
    record = Record.read("check")
    rows = [
        (name, f"{value:g}" if isinstance(value, float) else value) for name, value in record.results["counts"].items()
    ]
    return f"""
## Regression guard

`python -m bench.check`, which the tests run too, compares counts that do not depend on the machine with these:

{table(rows, ["on a decoder of 8 layers (kernels: of 4)", "count"], markdown=True)}
"""


def reading() -> str:
    return """## Reading and repeating

* On a CPU little is to be won: one core computes one member after the other anyway, and both forms read the same
  weights. What is saved is a norm, an addition and the start of two kernels per member, which shows where the FFNs are
  small.
* The backend's form keeps the members' weights beside the packed ones, looks at each call whether one has changed, and
  Dynamo guards every one of them; `fuse` has none of this, and is the form to serve.
* Compiling gets faster with every layer that is fused away.
* Under tensor parallelism a group needs one all-reduce instead of one per member. That is where the paper's gain comes
  from; no machine here can show it.

`make bench` runs every CPU benchmark within 10 minutes, each with its own share, and names what it left out;
`python -m bench.grid --continue` and the like go on from there. `python -m bench.gpu` needs torch, transformers,
networkx, tabulate and pydantic beside the checkout, takes under 8 minutes, and goes on with `--continue`.
"""


def left_out(record: Record) -> str:
    """What is missing in a file, and why."""
    if record.complete:
        return ""
    if not record.left_out:
        return "It was stopped before its end, so parts are missing."
    return f"Left out for lack of time: {'; '.join(record.left_out)}."


def _median(one: Measurement, name: str) -> str | None:
    return seconds(one.medians[name].value) if name in one.medians else None


if __name__ == "__main__":
    main()
