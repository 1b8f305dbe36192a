"""Everything that one GPU can tell, most important first, within a time: `bench/results/gpu.json`.

    python -m bench.gpu                       under 8 minutes on one GPU
    python -m bench.gpu --continue            goes on where the last run stopped or ran out of time
    python -m bench.gpu --device cpu --small  tiny shapes: does the script run?
    python -m bench.gpu --fit-cost-model      needs no GPU: how the three fitted constants of `fxfusion.cost` were found

Needs torch (2.11 or newer), transformers, networkx, tabulate and pydantic, and this checkout; no installation.

Order: limits of the machine; every form, tiny, against the form that it must equal; a whole 1B at one user under CUDA
graphs, intact, hoisted, wide and with attention dropped, against intact max-autotune, with each one's share of the
bandwidth; the same of an 8B; decoding in chains of 8 on slices of a 70B, on Super-49B's narrow FFNs and on slices of a
405B; a SmolLM2-135M; then models without half of their attention, prompts, more tokens, and the whole grid. Every form
is checked before it is timed. The file is written after each part, and says what was left out.

What is expected was written down before (docs/gpu_predictions.md, `python -m bench.performance_page`); it is recorded
and printed beside what was measured. See `expected`.

Goals of chains, at 1 to 16 tokens under CUDA graphs: at least 1.10x over unfused max-autotune on the 70B slice, 1.5x
on Super-49B's narrow FFNs, 0.90 of the bandwidth's limit on the 405B slice.

The fit: four published decode latencies (arXiv 2503.18908, table 2) and their three ratios against three constants of
the H100: the part of the memory bandwidth that large GEMMs reach, what a kernel costs at least, the least time of a
GEMM. The least sum of squares on a grid, each error in units of what is wanted (15 % of a latency, 7 % of a ratio).
Everything else comes from the sources in fxfusion/cost/devices/h100.json.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.grid import SHAPES, SMALL, TOKENS, Cell, Limits, columns, grid, measure_cell, measure_limits
from bench.record import Interval, Measurement, Session, arguments
from bench.show import by_kind, ratio_table, render, table, times
from bench.whole_models import (
    PAIRS,
    SIZES,
    Case,
    Pair,
    WindowCase,
    measure_case,
    measure_windows,
    plan_of,
    window_columns,
)
from fxfusion.cost.gain import BASELINES, LITTLE, gains
from fxfusion.cost.hardware import Hardware, known_hardware
from fxfusion.cost.kernels import Kernel, Phase, Workload, gemm, head_kernels, kernels_of
from fxfusion.cost.layer_table import Layer, LayerTable
from fxfusion.cost.published import LATENCIES, RATIOS, published_step
from fxfusion.cost.sublayers import Attention, Ffn, Step, Sublayer, arrange
from fxfusion.cost.timing import kernel_time, step_time
from fxfusion.plan.fusion_plan import FusionPlan

GRAPHS, AUTOTUNED = "reduce-overhead", "max-autotune"


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure in some modes; `needs`: seconds that it takes at most."""

    of: Cell | Case | WindowCase
    modes: tuple[str, ...]
    needs: float

    @property
    def place(self) -> dict[str, str | int]:
        """Where it goes in the file. The last mode tells parts of one cell apart."""
        return {**self.of.place, "mode": self.modes[-1] if self.modes else "default"}


def parts(small: bool, gpu: bool) -> Iterator[Part]:
    """All of them, most important first."""
    modes = (GRAPHS, AUTOTUNED) if gpu else ()
    cells = list(grid(SMALL if small else SHAPES))
    if not small:
        yield Part(next(grid(SMALL)), modes[:1], 40.0)
        yield Part(Case("small", "decode", 8, torch.bfloat16), modes[:1], 30.0)
        yield Part(WindowCase(Case("small", "decode", 8, torch.bfloat16), (2,), dropped=True), modes[:1], 30.0)
    decoding = [cell for cell in cells if cell.length == 8 and cell.tokens == 1 and cell.dtype == torch.bfloat16]
    few = [cell for cell in cells if cell.length == 8 and cell.tokens in (4, 16) and cell.dtype == torch.bfloat16]
    context = 8 if small else 512
    kept = [
        Part(
            WindowCase(Case(name, "decode", context, torch.bfloat16), (2 if small else 4,), dropped=True), modes, needs
        )
        for name, needs in ((("small", 0.0),) if small else (("1B", 90.0), ("8B", 120.0), ("SmolLM2-135M", 90.0)))
    ]
    yield from kept[:2]
    for cell in decoding[:3]:
        yield Part(cell, modes, 60.0)
    yield from kept[2:]
    yield from whole(small, gpu)
    for cell in (*few[:3], *decoding[3:5]):
        yield Part(cell, modes, 60.0)
    for cell in cells:
        yield Part(cell, modes[:1], 25.0)


def whole(small: bool, gpu: bool) -> Iterator[Part]:
    """Decoding under CUDA graphs; prompts in the default mode."""
    modes = (GRAPHS,) if gpu else ()
    names = ("small",) if small else ("8B", "70B, 16 layers")
    context, prompt = (8, 16) if small else (512, 1024)
    for name in names:
        yield Part(Case(name, "decode", context, torch.bfloat16), modes, 75.0)
    for name in names:
        yield Part(Case(name, "prefill", prompt, torch.bfloat16), (), 60.0)
    windowed, lengths = ("small", (2,)) if small else ("8B, 8 layers", (4,))
    yield Part(WindowCase(Case(windowed, "prefill", prompt, torch.bfloat16), lengths), (), 60.0)


class Runner:
    """Measures parts; keeps the last whole model, as the next part may be of it."""

    def __init__(self, device: str, limits: Limits, rounds: int) -> None:
        self.device, self.limits, self.rounds = device, limits, rounds
        self.held: tuple[str, Pair] | None = None

    def measure(self, part: Part) -> Measurement:
        of = part.of
        if not isinstance(of, Case):
            self.held = None
            self._free()
        if isinstance(of, Cell):
            found = measure_cell(of, self.device, self.limits, part.modes, rounds=self.rounds, threads=1)
        elif isinstance(of, WindowCase):
            model = SIZES[of.case.model].intact(of.case.dtype, self.device)
            found = measure_windows(of, model, part.modes, limits=self.limits, rounds=self.rounds, threads=1)
        else:
            mode = part.modes[-1] if part.modes else "default"
            pair = self._pair(of)
            found = measure_case(of, pair, self.limits, mode, rounds=self.rounds, threads=1)
        return found.model_copy(update={"place": part.place})

    def _pair(self, case: Case) -> Pair:
        if self.held is None or self.held[0] != case.model:
            self.held = None
            self._free()
            self.held = case.model, Pair.sized(case.model, case.dtype, self.device)
        return self.held[1]

    def _free(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def fits(cell: Cell, device: str) -> bool:
    """Whether the weights of all forms fit: the members, those that `fuse` made, and the backend's."""
    if device == "cpu":
        return True
    return 3.5 * cell.parameters * cell.dtype.itemsize < torch.cuda.get_device_properties(0).total_memory


# --- what is expected -----------------------------------------------------------------------------------

QUICK = {"kernel_latency": 1.3e-6, "gemm_floor": 0.0}
PYTHON = 10e-6  # a launch from Inductor's Python code: a third of `eager_latency`, which is of about three kernels
_PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Expected:
    """A ratio, or a share of the limit, between what two sets of constants give."""

    low: float
    high: float

    @classmethod
    def between(cls, one: float, other: float) -> Expected:
        return cls(*(round(end, 4) for end in sorted((one, other))))

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"

    def judge(self, low: float, high: float) -> str:
        """Whether what was measured, with its interval, lies there."""
        return "below" if high < self.low else "above" if low > self.high else "as expected"


def expected(part: Part, device: Hardware) -> dict[str, Expected]:
    """By ratio of the measurement, and `share of limit, FORM`; docs/gpu_predictions.md says between what.

    Kernels as Inductor launches them, timed by `fxfusion.cost` with the constants of the device, and with `QUICK`.
    Outside CUDA graphs the former are bound by launches from Python.
    """
    forms, work = kernels_of_forms(part.of)
    known, quick = (
        {form: _seconds(kernels, work, one) for form, kernels in forms.items()}
        for one in (device, device.model_copy(update=QUICK))
    )
    hosted = {form: max(known[form], PYTHON * len(kernels)) for form, kernels in forms.items()}
    found = {
        name: Expected.between(*(ends[base] / ends[form] for ends in (known if graphs else hosted, quick)))
        for name, base, form, graphs in named_ratios(part)
    }
    for form, kernels in forms.items():
        matrices = [one for one in kernels if one.tiles is not None]
        limit = sum(one.bytes for one in matrices) / device.bandwidth
        limit = max(limit, sum(one.flops for one in matrices) / device.rate(work.precision))
        suffix = f", {part.modes[-1]}" if isinstance(part.of, Cell) and part.modes else ""
        slow = known if part.modes else hosted
        found[f"share of limit, {form}{suffix}"] = Expected.between(limit / slow[form], limit / quick[form])
    return found


def _seconds(kernels: Iterable[Kernel], work: Workload, device: Hardware) -> float:
    return sum(kernel_time(kernel, work, device).seconds.total for kernel in kernels)


def named_ratios(part: Part) -> Iterator[tuple[str, str, str, bool]]:
    """Name in the measurement, which form's time is over which, and whether they run as CUDA graphs."""
    graphs = bool(part.modes)
    if isinstance(part.of, Cell):
        yield "unfused/fused", "unfused", "fused", False
        yield from ((f"unfused, {mode}/fused, {mode}", "unfused", "fused", True) for mode in part.modes)
    elif isinstance(part.of, Case):
        yield from ((f"unfused/{name}", "unfused", "fused", graphs) for name in ("fused", "surgery"))
    else:
        bases = ["intact", *(f"intact, {mode}" for mode in part.modes[1:])]
        names = itertools.product(bases, part.of.names)
        yield from ((f"{base}/{name}", "intact", name, graphs) for base, name in names)


def kernels_of_forms(of: Cell | Case | WindowCase) -> tuple[dict[str, list[Kernel]], Workload]:
    """What each form launches in one forward pass on one device."""
    if isinstance(of, Cell):
        work = Workload(precision=_PRECISIONS[of.dtype], batch=of.tokens)
        widths = of.shape.members(of.length)
        chains = {"unfused": [Ffn(width=width) for width in widths], "fused": [Ffn(width=sum(widths))]}
        last = Kernel(name="add", bytes=3 * of.tokens * of.shape.hidden * work.size)
        return {name: [*_launched(parts, of.shape.hidden, work), last] for name, parts in chains.items()}, work
    case = of if isinstance(of, Case) else of.case
    size = SIZES[case.model]
    phase: Phase = "prefill" if case.phase == "prefill" else "decode"
    work = Workload(precision=_PRECISIONS[case.dtype], context=case.tokens, phase=phase)
    if isinstance(of, Case):
        plans = {"unfused": FusionPlan(dropped_attention=size.run), "fused": plan_of(size, "dropped")}
    else:
        plans = {name: plan_of(size, name) for name in ("intact", *of.names)}
    heads: dict[str, int] = {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads}
    layers = (Layer(has_mixer=True, ffn_width=size.width),) * size.layers
    model = LayerTable(name=size.name, hidden_size=size.hidden, vocab_size=size.vocabulary, layers=layers, **heads)
    steps = {name: arrange(model, plan) for name, plan in plans.items()}
    return {
        name: [*_launched(step.sublayers, step.hidden, work), *head_kernels(step, work)] for name, step in steps.items()
    }, work


def _launched(parts: Iterable[Sublayer], hidden: int, work: Workload) -> Iterator[Kernel]:
    """As the cost model has them, but for products that Inductor leaves apart."""
    for part in parts:
        for kernel in kernels_of(part, hidden, work):
            widths: tuple[int, ...] = ()
            if isinstance(part, Ffn) and kernel.name == "gate and up":
                widths = (part.width, part.width)
            elif isinstance(part, Attention) and kernel.name == "qkv":
                keys = part.kv_heads * part.head_dim
                widths = (part.heads * part.head_dim, keys, keys)
            yield from (gemm(kernel.name, hidden, width, work) for width in widths) if widths else (kernel,)


def device_of(name: str) -> Hardware:
    """The known device whose name is in this one; an H200, for which this script was written, where none is."""
    return Hardware.of(next((one for one in known_hardware() if one in name.lower()), "h200"))


def compared(measurements: Iterable[Measurement], wanted: Mapping[str, Mapping[str, Expected]]) -> str:
    """What was measured beside what was expected, and whether it lies there."""
    rows = []
    for one in measurements:
        place = place_name(one.place)
        for name, range_ in wanted.get(place, {}).items():
            share = float(one.facts.get(name) or 0)
            found = one.ratios.get(name) or Interval.exact(share)
            shown = times(found) if name in one.ratios else f"{share:.2f}"
            rows.append((place, name, shown, range_, range_.judge(found.low, found.high)))
    return table(rows, ("part", "ratio or share", "measured", "expected", ""))


def place_name(place: Mapping[str, object]) -> str:
    return ", ".join(map(str, place.values()))


def page() -> str:
    """docs/gpu_predictions.md, for one H200."""
    device = Hardware.of("h200")
    every = [part for part in parts(small=False, gpu=True) if "small" not in part.place.values()]
    main = [part for part in every if not isinstance(part.of, Cell) or AUTOTUNED in part.modes]
    rows, grid_rows = [row for part in main for row in _rows(part, device)], dict[str, dict[int, Expected]]()
    for part in every:
        if isinstance(part.of, Cell) and AUTOTUNED not in part.modes and part.of.dtype == torch.bfloat16:
            name = f"{part.of.shape.name}, {part.of.length} members"
            grid_rows.setdefault(name, {})[part.of.tokens] = expected(part, device)[
                f"unfused, {GRAPHS}/fused, {GRAPHS}"
            ]
    h100, names = Hardware.of("h100"), ("253B before fusion", "253B")
    before, after = map(published_step, names)
    more: dict[str, Any] = {"batches": (1, 16, 64), "scales": (1.0,), "baselines": BASELINES}
    found = gains(before, after, Workload(precision="fp8"), h100, **more)
    chain = [len(kernels) for kernels in kernels_of_forms(next(grid()))[0].values()]
    constants = {"LITTLE": LITTLE, "TOKENS": TOKENS, "QUICK": QUICK, "PYTHON": PYTHON}
    words = {"rows": rows, "grid_rows": grid_rows, "found": found, "device": device, "chain": chain}
    return render("gpu_predictions.md.j2", constants | words)


def _rows(part: Part, device: Hardware) -> Iterator[tuple[object, ...]]:
    """Part, launches of both forms, ratio, what is expected of it, and of the share of the limit afterwards."""
    forms, _ = kernels_of_forms(part.of)
    found = expected(part, device)
    shares = {name.split(", ")[1]: one for name, one in found.items() if name.startswith("share")}
    ratios = {(base, form): name for name, base, form, graphs in named_ratios(part) if graphs == bool(part.modes)}
    for (base, form), name in ratios.items():
        launches = f"{len(forms[base])} -> {len(forms[form])}"
        yield place_name(part.place), f"{base} / {form}", launches, found[name], shares[form]


# --- constants of the cost model ----------------------------------------------------------------------

WORK = Workload(precision="fp8", tp=8)
FRACTIONS = [0.80, 0.84, 0.88, 0.90, 0.92]  # above 0.92 no kernel reads memory, whatever its size
LATENCY_US = [value / 10 for value in range(10, 61, 2)]
FLOOR_US = [value / 2 for value in range(4, 61)]


def errors(steps: dict[str, Step], device: Hardware) -> dict[str, float]:
    """Logarithms of predicted over published, by latency and by ratio."""
    speeds = {name: 1 / step_time(step, WORK, device).seconds.total for name, step in steps.items()}
    found = {name: math.log(speeds[name] / LATENCIES[name]) for name in LATENCIES}
    for one, other in RATIOS:
        found[f"{one} / {other}"] = found[one] - found[other]
    return found


def score(found: dict[str, float]) -> float:
    return sum((value / (0.15 if name in LATENCIES else 0.07)) ** 2 for name, value in found.items())


def fit_cost_model() -> str:
    """The best constants for each fraction, and their errors."""
    h100 = Hardware.of("h100")
    steps = {name: published_step(name) for name in LATENCIES}
    tried = []
    for fraction, latency, floor in itertools.product(FRACTIONS, LATENCY_US, FLOOR_US):
        constants = {"bandwidth_fraction": fraction, "kernel_latency": latency / 1e6, "gemm_floor": floor / 1e6}
        found = errors(steps, h100.model_copy(update=constants))
        tried.append((score(found), fraction, latency, floor, *found.values()))
    names = ("score", "bandwidth_fraction", "kernel_latency [us]", "gemm_floor [us]", *errors(steps, h100))
    best = {fraction: min(row for row in tried if row[1] == fraction) for fraction in FRACTIONS}
    rows = [[*row[:4], *(f"{math.exp(value) - 1:+.1%}" for value in row[4:])] for row in best.values()]
    return table(zip(names, *rows, strict=True), ())


def main() -> None:
    parser = arguments(__doc__, seconds=450.0, rounds=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, recorded only where --out says")
    parser.add_argument("--parts", type=int, help="stop after so many parts")
    parser.add_argument("--out", type=Path, help="another file than bench/results/gpu.json")
    parser.add_argument("--fit-cost-model", action="store_true", help="fit constants of the cost model, no more")
    chosen = parser.parse_args()
    if chosen.fit_cost_model:
        print(fit_cost_model())
        return
    gpu = chosen.device != "cpu"
    if gpu and not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no GPU (try --device cpu --small to test the script)")
    if chosen.small and chosen.out is None:
        parser.error("--small needs --out: tiny shapes are no result")
    torch.set_float32_matmul_precision("highest")
    with Session("gpu", seconds=chosen.seconds, path=chosen.out, fresh=not chosen.go_on) as session:
        limits = measure_limits(chosen.device, small=chosen.small)
        session.results["limits"] = limits.to_dict()
        device = device_of(torch.cuda.get_device_name() if gpu else "cpu")
        wanted = {place_name(part.place): expected(part, device) for part in parts(chosen.small, gpu)}
        session.predictions = {place: {name: asdict(one) for name, one in row.items()} for place, row in wanted.items()}
        runner = Runner(chosen.device, limits, chosen.rounds)
        for part in list(parts(chosen.small, gpu))[: chosen.parts]:
            if isinstance(part.of, Cell) and not fits(part.of, chosen.device):
                session.left_out.append(f"{part.place}: does not fit into the memory")
                continue
            needs = 0.0 if chosen.small else part.needs
            session.do(part.place, partial(runner.measure, part), needs=needs)
    print(summary(session.measurements), compared(session.measurements, wanted), sep="\n\n")


def summary(measurements: list[Measurement]) -> str:
    """A table for each kind, with the ratios that it has."""
    found = by_kind(measurements)
    heads = {
        "chains": columns(found["chains"]),
        "models": [(f"{a}/{b}", b) for a, b in PAIRS],
        "windows": window_columns(found["windows"]),
    }
    return "\n\n".join(ratio_table(kind, heads[name]) for name, kind in found.items() if kind)


if __name__ == "__main__":
    main()
