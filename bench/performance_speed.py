"""Sections of docs/performance.md: how fast chains and whole models are."""

from __future__ import annotations

from bench.performance_words import columns, gain, left_out, where
from bench.record import RESULTS, Record
from bench.tables import by_kind, bytes_, ratio_table, seconds, table


def chains() -> str:
    record = Record.read("chain_speed")
    found = record.measurements
    gains = [one.ratios["unfused/fused"] for one in found]
    better, worse = (sum(test(one) for one in gains) for test in (lambda one: one.low > 1, lambda one: one.high < 1))
    return f"""
## Chains of FFNs on the CPU

{where(record)}

Over {len(found)} cells of a chain of 8 FFNs the fused chain is {gain(one.value for one in gains)} as fast as the
unfused one. By the intervals it is faster in {better}, slower in {worse}, and neither in {len(found) - better - worse}.
*Hand written*: one FFN module as wide as all eight, compiled. *Unfused frozen*: the unfused chain under Inductor's
freezing, which packs weights as the default form of a group does, but never sees them change. *One linear*: a single
product with as many weights, at one token a plain GEMV; what is below 1 is the share of that limit.

{chain_goals(record.results["summary"])}

{ratio_table(found, columns(found), markdown=True)}
"""


def chain_goals(summary: dict[str, float]) -> str:
    """What issue 5 asks for, and what was measured."""
    rows = [
        ("over unfused, geometric mean", "1.20x", f"{summary['geomean_over_unfused']:.2f}x"),
        ("over unfused, frozen", "1.35x", f"{summary['geomean_over_unfused_frozen']:.2f}x"),
        ("over one hand-written wide FFN, geometric mean", "0.97x", f"{summary['geomean_of_hand_written']:.2f}x"),
        ("cells whose interval lies below 0.97x of unfused", "0", f"{summary['cells_below_0.97']:.0f}"),
        ("of a GEMV, 1 token, weights beyond the cache, float32", "0.90x", share(summary["least_of_limit_float32"])),
        ("of a GEMV, 1 token, weights beyond the cache, bfloat16", "0.75x", share(summary["least_of_limit_bfloat16"])),
    ]
    return table(rows, ("figure", "goal", "measured"), markdown=True)


def share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}x at least"


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
    kinds = by_kind(record.measurements).values()
    tables = [ratio_table(found, columns(found), markdown=True) for found in kinds if found]
    return "\n\n".join([f"## GPU\n\n{where(record)} {left_out(record)}", *tables])
