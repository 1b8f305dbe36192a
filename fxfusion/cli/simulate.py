"""`fxfusion simulate MODEL`: latency, memory and price of a model by arithmetic alone; no weights, no device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli import road_options
from fxfusion.cli.options import AsJson, Overwrite, PlanFile, read_layers
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import stdout_for_json, stopping_cleanly
from fxfusion.cli.simulated import show, show_gains, show_hardware, show_placements
from fxfusion.errors import OptionError
from fxfusion.files import check_file

if TYPE_CHECKING:
    from fxfusion.cost import LayerTable, Simulation, Step
    from fxfusion.plan.fusion_plan import FusionPlan

_HARDWARE = "h100"


class Phase(str, Enum):
    """What a step is."""

    decode = "decode"
    prefill = "prefill"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A layer table (a name such as llama-3.3-70b, or a file), a config.json, or a folder with one.",
        show_default=False,
    ),
]
PrecisionName = Annotated[str, typer.Option("--precision", help="Of the weights: fp4, fp8, int8, bf16, fp16, fp32.")]
KvPrecision = Annotated[
    str | None, typer.Option("--kv-precision", help="Of the key-value cache.", show_default="16 bits; 32 with fp32")
]
Users = Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")]
Context = Annotated[int, typer.Option("--context", min=0, help="Tokens of each: in the cache; to be read (prefill).")]
PhaseName = Annotated[Phase, typer.Option("--phase", help="One token of each sequence, or all of their prompts.")]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        metavar="LAYERS",
        help="FFNs to fuse, such as 66-73 (positions, padding included); may be repeated.",
        show_default=False,
    ),
]
Unfuse = Annotated[
    list[str] | None,
    typer.Option(
        "--unfuse",
        metavar="LAYER:COUNT",
        help="Split the FFN of a layer into equal ones first, such as 125:8; may be repeated.",
        show_default=False,
    ),
]
Price = Annotated[float | None, typer.Option("--price", help="Of one device for an hour.", show_default=False)]


Output = Annotated[
    Path | None,
    typer.Option("--output", help="Where --sweep goes: a .csv, or a plot as .png, .svg or .pdf.", show_default=False),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        metavar="FILE",
        help="Measure --device for half a minute and write a file for --hardware.",
        show_default=False,
    ),
]


def command(
    model: Model = None,
    hardware: road_options.Hardware = None,
    tp: road_options.Tp = 1,
    precision: PrecisionName = "bf16",
    kv_precision: KvPrecision = None,
    batch: Users = 1,
    context: Context = 1024,
    phase: PhaseName = Phase.decode,
    group: Groups = None,
    unfuse: Unfuse = None,
    plan: PlanFile = None,
    price: Price = None,
    placement: Annotated[bool, typer.Option("--placement", help="Compare sizes of --tp and ways to cut runs.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Gain of fusing over tp, batch and scale.")] = False,
    output: Output = None,
    calibrate: Calibrate = None,
    device: Annotated[str, typer.Option("--device", help="What --calibrate measures: cpu, cuda, cuda:1.")] = "cpu",
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Predict one step of a model: latency, tokens per second, memory, price; fused first where groups are named.

    Needs no weights and no device; the hardware is an H100 unless another is named. What was fitted, and how far
    predictions are off, is in docs/cost.md.
    """
    with stopping_cleanly("nothing was written"), stdout_for_json(as_json):
        screen = Screen(quiet=as_json, notes_on_stderr=True)
        _check_modes(placement, sweep, output, calibrate, overwrite, (model, hardware, plan))
        if calibrate is not None:
            result = _calibrate(screen, calibrate, device, overwrite)
        else:
            work = {"tp": tp, "precision": precision, "batch": batch, "context": context, "phase": phase.value}
            request = Request(
                table=_model(model),
                hardware=hardware or _HARDWARE,
                work={**work, "kv_precision": kv_precision},
                price=price,
                unfuse=_unfuse(unfuse or []),
                groups=[read_layers(text, "--group") for text in group or []],
                plan=_plan(plan),
            )
            result = _answer(screen, request, placement, sweep, output, overwrite)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))


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
            raise OptionError(f"--sweep: {self.table.name} has no FFNs in a row; name some with --group or --plan")
        return before, fused(before, [(run,) for run in runs])


def _check_modes(
    placement: bool,
    sweep: bool,
    output: Path | None,
    calibrate: Path | None,
    overwrite: bool,
    reads: Sequence[str | Path | None],
) -> None:
    modes = {"--placement": placement, "--sweep": sweep, "--calibrate": calibrate is not None}
    chosen = [name for name, given in modes.items() if given]
    if len(chosen) > 1:
        raise OptionError(f"{chosen[0]} and {chosen[1]} were both given; give one of them")
    if output is not None and not sweep:
        raise OptionError("--output: only --sweep writes a file")
    known = [read for read in reads if read is not None and Path(read).exists()]
    for path, kind in ((output, "gains"), (calibrate, "hardware file")):
        if path is not None:
            check_file(path, kind, overwrite=overwrite, reads=known)


def _answer(
    screen: Screen, request: Request, placement: bool, sweep: bool, output: Path | None, overwrite: bool
) -> dict[str, Any]:
    if placement:
        return _placement(screen, request)
    return _sweep(screen, request, output, overwrite) if sweep else _simulate(screen, request)


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


def _sweep(screen: Screen, request: Request, output: Path | None, overwrite: bool) -> dict[str, Any]:
    from fxfusion.cost import Hardware, Workload
    from fxfusion.cost.gain import gains

    before, after = request.steps()
    found = gains(before, after, Workload(**request.work), Hardware.of(request.hardware))
    show_gains(screen, found)
    if output is not None:
        found.save(output, overwrite=overwrite)
        screen.line(f"written: {output}", "dim")
    return found.to_dict()


def _calibrate(screen: Screen, path: Path, device: str, overwrite: bool) -> dict[str, Any]:
    if path.suffix.lower() != ".json":
        raise OptionError(f"--calibrate {path}: expected a name that ends in .json")
    from fxfusion.cost import calibrate

    with screen.busy(f"measuring {device}"):
        found = calibrate(device)
    found.save(path, overwrite=overwrite)
    show_hardware(screen, found)
    screen.line(f"written: {path}; use it as --hardware {path}", "dim")
    return found.to_dict()


def _model(model: str | None) -> LayerTable:
    if model is None:
        raise OptionError("MODEL: name a layer table, a config.json, or a folder with one")
    from fxfusion.cost.read_table import UndecidedError, read_table

    try:
        return read_table(model)
    except UndecidedError:
        folder = Path(model) if Path(model).is_dir() else Path(model).parent
        if Path(model) not in (folder, folder / "config.json"):
            raise
        return _built(folder)


def _built(folder: Path) -> LayerTable:
    """The table of a model whose config alone does not tell it: built without weights and looked at."""
    import torch

    from fxfusion.cli.inputs import build_without_weights
    from fxfusion.models.traced import TracedModel
    from fxfusion.planning.latency import table_of_model

    model = build_without_weights(folder)
    graph = TracedModel(model).graph(torch.zeros(1, 8, dtype=torch.long, device="meta"))
    return table_of_model(model, graph)


def _plan(path: Path | None) -> FusionPlan | None:
    if path is None:
        return None
    from fxfusion.plan.fusion_plan import FusionPlan

    return FusionPlan.load(path)


def _unfuse(texts: Sequence[str]) -> dict[int, int]:
    """`["125:8"]` -> `{125: 8}`. Raises `OptionError` that names the text."""
    found: dict[int, int] = {}
    for text in texts:
        layer, colon, count = text.partition(":")
        if not (colon and layer.isdecimal() and count.isdecimal()):
            raise OptionError(f"--unfuse: expected a layer and a number of members such as 125:8, got {text!r}")
        if int(layer) in found:
            raise OptionError(f"--unfuse: layer {layer} is named twice")
        found[int(layer)] = int(count)
    return found
