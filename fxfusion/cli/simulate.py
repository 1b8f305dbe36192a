"""`fxfusion simulate MODEL`: latency, memory and price of a model by arithmetic alone; no weights, no device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.options import AsJson, PlanFile, read_layers
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import stdout_for_json, stopping_cleanly
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from fxfusion.cost import LayerTable, Simulation
    from fxfusion.plan import FusionPlan


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
HardwareName = Annotated[
    str, typer.Option("--hardware", help="a100, b200, cpu, h100, h200, or a .json or .yaml file of its constants.")
]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Devices that share every matrix.")]
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


def command(
    model: Model = None,
    hardware: HardwareName = "h100",
    tp: Tp = 1,
    precision: PrecisionName = "bf16",
    kv_precision: KvPrecision = None,
    batch: Users = 1,
    context: Context = 1024,
    phase: PhaseName = Phase.decode,
    group: Groups = None,
    unfuse: Unfuse = None,
    plan: PlanFile = None,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """Predict one step of a model: latency, tokens per second, memory, price; fused first where groups are named.

    Needs no weights and no device. What was fitted, and how far predictions are off, is in docs/cost.md.
    """
    with stopping_cleanly("nothing was written"), stdout_for_json(as_json):
        screen = Screen(quiet=as_json, notes_on_stderr=True)
        request = Request(
            table=_model(model),
            options={
                "hardware": hardware,
                "tp": tp,
                "precision": precision,
                "kv_precision": kv_precision,
                "batch": batch,
                "context": context,
                "phase": phase.value,
                "price": price,
            },
            unfuse=_unfuse(unfuse or []),
            groups=[read_layers(text, "--group") for text in group or []],
            plan=_plan(plan),
        )
        result = _simulate(screen, request)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the options of the command mean."""

    table: LayerTable
    options: dict[str, Any]
    unfuse: dict[int, int]
    groups: list[list[int]]
    plan: FusionPlan | None

    def run(self, fused: bool = True, **changes: Any) -> Simulation:
        """One simulation, as the model is or with its groups and plan."""
        from fxfusion.cost import simulate

        arranged: dict[str, Any] = {"plan": self.plan, "groups": self.groups} if fused else {}
        return simulate(self.table, unfuse=self.unfuse, **arranged, **(self.options | changes))


def _simulate(screen: Screen, request: Request) -> dict[str, Any]:
    found = request.run()
    result = found.to_dict()
    shown = [("", found)]
    if request.plan is not None or request.groups:
        before = request.run(fused=False)
        result["before"] = before.to_dict()
        shown = [("as it is", before), ("fused", found)]
    show(screen, shown)
    return result


def show(screen: Screen, found: list[tuple[str, Simulation]]) -> None:
    """Simulations side by side."""
    first = found[0][1]
    work = first.work
    what = "prompts of" if work.phase == "prefill" else "cached tokens of each:"
    device = f"{work.tp} x {first.hardware.name}"
    screen.line(f"{first.name} on {device}, {work.precision}, batch {work.batch}, {what} {work.context}")
    columns = [_rows(one) for _, one in found]
    screen.table(("", *(name for name, _ in found)), [(name, *(each[name] for each in columns)) for name in columns[0]])
    if len(found) > 1:
        screen.line(f"{first.latency_ms / found[-1][1].latency_ms:.3f}x as fast")


def _rows(one: Simulation) -> dict[str, str]:
    rows = {
        "latency [ms]": f"{one.latency_ms:.3f}",
        **{f"  {name.replace('_', '-')}": f"{value:.3f}" for name, value in one.to_dict()["breakdown_ms"].items()},
        "tokens per second": f"{one.tokens_per_second:.2f}",
        "kernels, all-reduces": f"{one.kernels}, {one.all_reduces}",
        "attentions, FFNs in a row": f"{one.attentions}, {one.ffns}",
        "memory of a device [GB]": f"{one.bytes.total / 1e9:.2f}" + ("" if one.fits_in_memory else " (does not fit)"),
    }
    if one.cost_per_million_tokens is not None:
        rows["cost of a million tokens"] = f"{one.cost_per_million_tokens:.3f}"
    return rows


def _model(model: str | None) -> LayerTable:
    if model is None:
        raise OptionError("MODEL: name a layer table, a config.json, or a folder with one")
    from fxfusion.cost import read_table

    return read_table(model)


def _plan(path: Path | None) -> FusionPlan | None:
    if path is None:
        return None
    from fxfusion.plan import FusionPlan

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
