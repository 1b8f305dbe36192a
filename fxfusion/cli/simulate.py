"""`fxfusion simulate MODEL`: latency, memory and price of a model by arithmetic alone; no weights, no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import read_layers
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import Run, command
from fxfusion.errors import OptionError
from fxfusion.files import check_file

if TYPE_CHECKING:
    from fxfusion.cost import LayerTable, Simulation, Step
    from fxfusion.cost.gain import Gains
    from fxfusion.cost.hardware import Hardware
    from fxfusion.cost.placement import Placements
    from fxfusion.plan.fusion_plan import FusionPlan

_HARDWARE = "h100"


class Phase(str, Enum):
    """What a step is."""

    decode = "decode"
    prefill = "prefill"


class Launch(str, Enum):
    """How kernels are started."""

    cuda_graph = "cuda-graph"
    eager = "eager"
    megakernel = "megakernel"


class AllReduce(str, Enum):
    """What its kernel does besides."""

    plain = "plain"
    fused_norm = "fused-norm"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A layer table (a name such as llama-3.3-70b, or a file), a config.json, its folder, or a GGUF file.",
        show_default=False,
    ),
]
PrecisionName = Annotated[str, typer.Option("--precision", help="Of the weights: fp4, fp8, int8, bf16, fp16, fp32.")]
KvPrecision = Annotated[
    str | None, typer.Option("--kv-precision", help="Of the key-value cache.", show_default="16 bits; 32 with fp32")
]
Users = Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")]
Length = Annotated[int, typer.Option("--length", min=0, help="Tokens of each: in the cache; to be read (prefill).")]
PhaseName = Annotated[Phase, typer.Option("--phase", help="One token of each sequence, or all of their prompts.")]
LaunchName = Annotated[
    Launch | None,
    typer.Option("--launch", help="What launches kernels.", show_default="cuda-graph; all kinds with --sweep"),
]
AllReduceName = Annotated[
    AllReduce | None,
    typer.Option(
        "--all-reduce",
        help="fused-norm: residual and norm in its kernel, as vLLM and TensorRT-LLM do.",
        show_default="plain; both with --sweep",
    ),
]
Unfuse = Annotated[
    list[str] | None,
    typer.Option(
        "--unfuse",
        metavar="LAYERS:COUNT",
        help="Split the FFN of a layer into equal ones first, such as 125:8; may be repeated.",
        show_default=False,
    ),
]
Price = Annotated[float | None, typer.Option("--price", help="Of one device for an hour.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Of --sweep: a .csv, or a plot as .png, .svg or .pdf. Of --calibrate: a .json.",
        show_default=False,
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option("--calibrate", help="Measure --device for half a minute, and write a file for --hardware (--output)."),
]


@command
def simulate(
    run: Run,
    model: Model = None,
    hardware: options.Hardware = None,
    tp: options.Tp = 1,
    precision: PrecisionName = "bf16",
    kv_precision: KvPrecision = None,
    batch: Users = 1,
    length: Length = 1024,
    phase: PhaseName = Phase.decode,
    launch: LaunchName = None,
    all_reduce: AllReduceName = None,
    groups: options.Groups = None,
    unfuse: Unfuse = None,
    plan: options.PlanFile = None,
    price: Price = None,
    placement: Annotated[bool, typer.Option("--placement", help="Compare sizes of --tp and ways to cut runs.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Gain of fusing over tp, batch and scale.")] = False,
    output: Output = None,
    calibrate: Calibrate = False,
    device: Annotated[str, typer.Option("--device", help="What --calibrate measures: cpu, cuda, cuda:1.")] = "cpu",
) -> dict[str, Any]:
    """Predict one step of a model: latency, tokens per second, memory, price; fused first where groups are named.

    Needs no weights and no device; the hardware is an H100 unless another is named. What was fitted, and how far
    predictions are off, is in docs/cost.md.
    """
    _check_modes(run, placement, sweep, output, calibrate, (model, hardware, plan))
    if calibrate:
        return _calibrate(run, output, device)
    work = {"tp": tp, "precision": precision, "batch": batch, "context": length, "phase": phase.value}
    baseline = {"launch": launch, "all_reduce": all_reduce}
    request = Request(
        table=_model(run, model),
        hardware=hardware or _HARDWARE,
        work={**work, "kv_precision": kv_precision, **{name: one.value for name, one in baseline.items() if one}},
        price=price,
        unfuse=_unfuse(unfuse or []),
        groups=[read_layers(text, "--groups") for text in groups or []],
        plan=None if plan is None else fxfusion.FusionPlan.load(plan),
    )
    if placement:
        return _placement(run.screen, request)
    return _sweep(run, request, output) if sweep else _simulate(run.screen, request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the options of the command mean. `work`: fields of a `Workload`."""

    table: LayerTable
    hardware: str
    work: dict[str, Any]
    price: float | None
    unfuse: dict[int, int]
    groups: list[list[int]]
    plan: FusionPlan | None

    @property
    def fuses(self) -> bool:
        """Whether something is to be fused or dropped."""
        return self.plan is not None or bool(self.groups)

    def run(self, fused: bool = True) -> Simulation:
        """One simulation, as the model is or with its groups and plan."""
        from fxfusion.cost import simulate

        arranged: dict[str, Any] = {"plan": self.plan, "groups": self.groups} if fused else {}
        return simulate(
            self.table, hardware=self.hardware, unfuse=self.unfuse, price=self.price, **self.work, **arranged
        )

    def steps(self) -> tuple[Step, Step]:
        """Before and after fusing. Without groups: `--unfuse` undone, or each run but its ends as one FFN."""
        from fxfusion.cost import arrange
        from fxfusion.cost.cuts import fusable_runs, fused
        from fxfusion.plan.policy import PRESETS

        drops = None if self.plan is None else self.plan.replace(groups=())  # not what fusing gains
        before = arrange(self.table, drops, unfuse=self.unfuse)
        if self.fuses:
            return before, arrange(self.table, self.plan, self.groups, self.unfuse)
        if self.unfuse:
            return before, arrange(self.table)
        runs = fusable_runs(before, PRESETS["paper"])
        if not runs:
            raise OptionError(f"--sweep: {self.table.name} has no run of FFNs; name some with --groups or --plan")
        return before, fused(before, [(run,) for run in runs])


def _check_modes(
    run: Run,
    placement: bool,
    sweep: bool,
    output: Path | None,
    calibrate: bool,
    reads: Sequence[str | Path | None],
) -> None:
    modes = {"--placement": placement, "--sweep": sweep, "--calibrate": calibrate}
    chosen = [name for name, given in modes.items() if given]
    if len(chosen) > 1:
        raise OptionError(f"{chosen[0]} and {chosen[1]} were both given; give one of them")
    if output is not None and not (sweep or calibrate):
        raise OptionError("--output: only --sweep and --calibrate write a file")
    known = [read for read in reads if read is not None and Path(read).exists()]
    if output is not None:
        check_file(output, "hardware file" if calibrate else "gains", overwrite=run.overwrite, reads=known)


def _simulate(screen: Screen, request: Request) -> dict[str, Any]:
    found = request.run()
    result = found.to_dict()
    shown = [("", found)]
    if request.fuses:
        before = request.run(fused=False)
        result["before"] = before.to_dict()
        shown = [("as it is", before), ("fused", found)]
    show(screen, shown)
    return result


def _placement(screen: Screen, request: Request) -> dict[str, Any]:
    from fxfusion.cost import Hardware, Workload, arrange
    from fxfusion.cost.placement import placements

    step = arrange(request.table, request.plan, request.groups, request.unfuse)
    device = Hardware.of(request.hardware)
    found = placements(step, Workload(**request.work), device, price=request.price)
    show_placements(screen, found)
    return {"model": step.name, "hardware": device.name, **found.to_dict()}


def _sweep(run: Run, request: Request, output: Path | None) -> dict[str, Any]:
    from fxfusion.cost import Hardware, Workload
    from fxfusion.cost.gain import BASELINES, gains

    before, after = request.steps()
    named = request.work.keys() & {"launch", "all_reduce"}
    compared = None if named else BASELINES
    found = gains(before, after, Workload(**request.work), Hardware.of(request.hardware), baselines=compared)
    show_gains(run.screen, found)
    if output is not None:
        found.save(output, overwrite=run.overwrite)
        run.screen.line(f"written: {output}", "dim")
    return found.to_dict()


def _calibrate(run: Run, path: Path | None, device: str) -> dict[str, Any]:
    if path is None or path.suffix.lower() != ".json":
        raise OptionError(
            f"--calibrate: --output names the file, which ends in .json{'' if path is None else f'; got {path}'}"
        )
    from fxfusion.cost import calibrate

    with run.screen.busy(f"measuring {device}"):
        found = calibrate(device)
    found.save(path, overwrite=run.overwrite)
    show_hardware(run.screen, found)
    run.screen.line(f"written: {path}; use it as --hardware {path}", "dim")
    return found.to_dict()


def _model(run: Run, model: str | None) -> LayerTable:
    if model is None:
        raise OptionError("MODEL: name a layer table, a config.json, a folder with one, or a GGUF file")
    from fxfusion.checkpoints.gguf.header import is_gguf
    from fxfusion.cost.read_table import UndecidedError, read_table

    if is_gguf(model):
        run.tell_read(Path(model))
        return _built(Path(model))
    try:
        return read_table(model)
    except UndecidedError:
        folder = Path(model) if Path(model).is_dir() else Path(model).parent
        if Path(model) not in (folder, folder / "config.json"):
            raise
        return _built(folder)


def _built(folder: Path) -> LayerTable:
    """The table of a model whose config alone does not tell it: built without weights and looked at."""
    from fxfusion.cli.inputs import graph_without_weights
    from fxfusion.planning.price import table_of_model

    return table_of_model(*graph_without_weights(folder, tokens=8))


def _unfuse(texts: Sequence[str]) -> dict[int, int]:
    """`["125:8"]` -> `{125: 8}`, `["3-4,9:2"]` -> `{3: 2, 4: 2, 9: 2}`. Raises `OptionError` that names the text."""
    found: dict[int, int] = {}
    for text in texts:
        layers, colon, count = text.partition(":")
        if not (colon and count.isdecimal()):
            raise OptionError(f"--unfuse: expected a layer and a number of members such as 125:8, got {text!r}")
        for layer in read_layers(layers, "--unfuse"):
            if layer in found:
                raise OptionError(f"--unfuse: layer {layer} is named twice")
            found[layer] = int(count)
    return found


# --- what is printed ----------------------------------------------------------------------------------


def show(screen: Screen, found: Sequence[tuple[str, Simulation]]) -> None:
    """Simulations side by side."""
    first = found[0][1]
    work = first.work
    what = "prompts of" if work.phase == "prefill" else "cached tokens of each:"
    device = f"{work.tp} x {first.hardware.name}, {work.launch}"
    device += f", all-reduce {work.all_reduce}" if work.tp > 1 else ""
    screen.line(f"{first.name} on {device}, {work.precision}, batch {work.batch}, {what} {work.context}")
    columns = [_rows(one) for _, one in found]
    screen.table(("", *(name for name, _ in found)), [(name, *(each[name] for each in columns)) for name in columns[0]])
    for window in found[-1][1].to_dict()["windows"]:
        screen.line(_window_text(window))
    if len(found) > 1:
        screen.line(f"{first.latency_ms / found[-1][1].latency_ms:.3f}x as fast")


def _window_text(window: Mapping[str, Any]) -> str:
    """`window 4-5 (hoist): 3 sublayers instead of 4, 3 all-reduces instead of 4`"""
    layers = window["layers"]
    shown = f"window {layers[0]}-{layers[-1]} ({window['mixers']}): "
    shown += f"{window['sublayers']} sublayers instead of {window['sublayers_before']}"
    if window["all_reduces"]:
        shown += f", {window['all_reduces']} all-reduces instead of {window['all_reduces_before']}"
    return shown


def _rows(one: Simulation) -> dict[str, str]:
    rows = {
        "latency [ms]": f"{one.latency_ms:.3f}",
        **{f"  {name.replace('_', '-')}": f"{value:.3f}" for name, value in one.to_dict()["breakdown_ms"].items()},
        "tokens per second": f"{one.tokens_per_second:.2f}",
        "kernels, all-reduces": f"{one.kernels}, {one.all_reduces}",
        "attentions, FFN depth": f"{one.attentions}, {one.ffns}",
        "memory of a device [GB]": f"{one.bytes.total / 1e9:.2f}" + ("" if one.fits_in_memory else " (does not fit)"),
    }
    if one.cost_per_million_tokens is not None:
        rows["cost of a million tokens"] = f"{one.cost_per_million_tokens:.3f}"
    return rows


def show_placements(screen: Screen, found: Placements) -> None:
    """A row for each alternative."""
    rows = []
    for one in found.rows:
        simulation, cost = one.simulation, one.simulation.cost_per_million_tokens
        rows.append(
            (
                f"{simulation.work.tp}{' *' if one is found.quickest else ''}",
                one.cut,
                _sizes(one.groups),
                f"{simulation.latency_ms:.3f}",
                simulation.all_reduces,
                f"{simulation.bytes.total / 1e9:.1f}{'' if one.fits else ' !'}",
                f"{one.making / 1e9:.1f}{'' if one.can_fuse else ' !'}",
                "" if cost is None else f"{cost:.2f}",
            )
        )
    heads = ("tp", "cut", "groups of", "ms", "all-reduces", "GB", "GB fusing", "cost of 1M")
    screen.table(heads, rows)
    screen.line("! more than the usable memory of a device. * the quickest that fits, fusing included", "dim")
    for tp, why in found.refused.items():
        screen.line(f"tp {tp}: {why}", "dim")


def _sizes(groups: Sequence[int]) -> str:
    """`8, 12, 3 x 2`"""
    counts = [(size, len(list(same))) for size, same in groupby(groups)]
    return ", ".join(str(size) if count == 1 else f"{count} x {size}" for size, count in counts)


def show_gains(screen: Screen, found: Gains) -> None:
    """Batches across, sizes and scales down; a table for each baseline."""
    batches = sorted({point.batch for point in found.points})
    for baseline in found.baselines:
        rows: dict[str, dict[int, str]] = {}
        for point in found.of(baseline):
            rows.setdefault(f"{point.hidden}, tp {point.tp}", {})[point.batch] = f"{point.gain:.3f}"
        screen.line(f"latency before / after fusing on {baseline}, {found.name}, {found.hardware}, {found.precision}")
        heads = ("hidden size", *(f"batch {batch}" for batch in batches))
        screen.table(heads, [(name, *(row.get(batch, "") for batch in batches)) for name, row in rows.items()])
    screen.line(found.little)
    for why in found.refused:
        screen.line(why, "dim")


def show_hardware(screen: Screen, found: Hardware) -> None:
    """What was measured."""
    rows = [("memory bandwidth [GB/s]", f"{found.bandwidth / 1e9:.1f}")]
    rows += [(f"GEMM, {kind} [GFLOP/s]", f"{found.rate(kind) / 1e9:.1f}") for kind in found.flops]
    rows += [
        ("a small kernel [us]", f"{found.kernel_latency * 1e6:.2f}"),
        ("a small GEMM besides [us]", f"{found.gemm_floor * 1e6:.2f}"),
    ]
    screen.table((found.name, ""), rows)
