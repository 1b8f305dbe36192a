"""What commands share that read one model folder and write another: options, JSON, a clean stop.

    @converting
    def command(run: Conversion, model_dir: ModelDir, out_dir: OutDir) -> dict[str, Any]: ...

is a command with these options and those of `Conversion`; what it returns is printed under `--json`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fxfusion.cli.options import AsJson, Device, DType, Overwrite, check_folder
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import stdout_for_json, stopping_cleanly

if TYPE_CHECKING:
    import torch

    from fxfusion.plan.fusion_plan import FusionPlan


class Format(str, Enum):
    """How a model folder is laid out."""

    canonical = "canonical"
    nemotron_nas = "nemotron-nas"


OutDir = Annotated[
    Path, typer.Argument(metavar="OUT_DIR", help="Where the new folder goes; it replaces one that fxfusion wrote.")
]
StoredDType = Annotated[DType, typer.Option("--dtype", help="auto: as the weights are stored.")]
Plan = Annotated[Path | None, typer.Option("--plan", help="A plan file, such as plan.yaml.", show_default=False)]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Of one file of weights at most.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be written; reads no weights.")]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One run of such a command."""

    device: Device = "cpu"
    dtype: StoredDType = DType.auto
    as_json: AsJson = False
    overwrite: Overwrite = False

    @cached_property
    def screen(self) -> Screen:
        return Screen(quiet=self.as_json, notes_on_stderr=True)

    def load(self, folder: Path, *, fused: bool = True) -> Any:
        """The model of a folder; without `fused`, its plan drops attention and fuses nothing."""
        check_folder(folder)
        with self.screen.busy(f"loading {folder}"):
            import torch

            from fxfusion.checkpoints.api import from_pretrained
            from fxfusion.cli.inputs import pick_device

            dtype: torch.dtype | None = None if self.dtype is DType.auto else getattr(torch, self.dtype.value)
            device = pick_device(self.device)
        return from_pretrained(folder, dtype=dtype, device=device, fused=fused, progress=self.screen.notes.is_terminal)


def converting(body: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """A typer command out of `body(run, own options)`."""

    @functools.wraps(body)
    def command(**given: Any) -> None:
        run = Conversion(**{field.name: given.pop(field.name) for field in fields(Conversion)})
        with stopping_cleanly("no folder was changed"), stdout_for_json(run.as_json):
            result = body(run, **given)
        if run.as_json:
            print(json.dumps(result, indent=2, allow_nan=False))

    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(Conversion, include_extras=True)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    merged = [parameter.replace(kind=keyword_only) for parameter in own]
    merged += [
        inspect.Parameter(field.name, keyword_only, default=field.default, annotation=hints[field.name])
        for field in fields(Conversion)
    ]
    command.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return command


def facts(model: Any, plan: FusionPlan) -> dict[str, Any]:
    """A model in numbers, for people and for JSON."""
    from fxfusion.models.fingerprint import decoder_layers

    weights = {id(value): value for value in model.parameters()}.values()
    return {
        "architecture": type(model).__name__,
        "layers": len(decoder_layers(model)[1]),
        "parameters": sum(value.numel() for value in weights),
        "bytes": sum(value.numel() * value.element_size() for value in weights),
        "dropped_attention": list(plan.dropped_attention),
        "groups": [group.to_data() for group in plan.groups],
        "norm": plan.norm,
    }


def show(screen: Screen, name: str, found: dict[str, Any]) -> None:
    """One line on a model."""
    size = f"{found['parameters']:,} parameters, {found['bytes'] / 2**20:,.1f} MiB"
    screen.line(f"{name}: {found['architecture']}, {found['layers']} layers, {size}")


def say_engines(screen: Screen, engines: dict[str, str | None]) -> None:
    """Which engines load a nemotron-nas folder, by their own rules."""
    screen.table(("engine", "loads it"), [(name, why or "yes") for name, why in engines.items()])
