"""Options that several commands share, each defined once, and how their texts are read.

Read before every `--help`, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fxfusion.errors import FxFusionError, OptionError

T = TypeVar("T")


class Method(str, Enum):
    """How attention is scored."""

    cosine = "cosine"
    loss = "loss"
    kl = "kl"


class Unit(str, Enum):
    """What the dependency matrix is about."""

    ffn = "ffn"
    block = "block"


class Norm(str, Enum):
    """Which norm gain the members of a group use."""

    fold = "fold"
    last = "last"


class Compiler(str, Enum):
    """What compiles the rewritten graph."""

    inductor = "inductor"
    aot_eager = "aot_eager"
    eager = "eager"


class DType(str, Enum):
    """What the weights are loaded as."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A local model folder; nothing is downloaded.", show_default=False)
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="A text file, a folder of them, or token ids (.safetensors); may be repeated.",
        show_default=False,
    ),
]
Suffix = Annotated[
    list[str] | None,
    typer.Option(metavar="SUFFIX", help="Which files of a folder are text; may be repeated.", show_default=".txt, .md"),
]
Length = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences per batch.")]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences at most, in whole batches.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: an accelerator if there is one.")]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="auto: float32 on a CPU, elsewhere as it is stored.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides which sequences are read, and the resamples of intervals.")]
Results = Annotated[Path, typer.Option(help="Folder where everything measured is kept, and found again.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what is known already.")]

Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace files or folders that fxfusion did not write, or that changed since."),
]

PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan file, such as plan.yaml.", show_default=False)]
DropAttention = Annotated[
    str | None,
    typer.Option(metavar="LAYERS", help="Layers that lose their attention, such as 4-8 or 4,5,6.", show_default=False),
]
MaxMembers = Annotated[int | None, typer.Option(min=1, help="FFNs in one group at most.", show_default=False)]
MaxWidth = Annotated[
    int | None, typer.Option(min=1, help="Intermediate channels of one fused FFN at most.", show_default=False)
]
MaxBytes = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="Weights of one fused FFN at most, such as 256M or 2G.", show_default=False),
]
MaxDependency = Annotated[
    float | None, typer.Option(min=0, help="Largest dependency inside a group (0.01: one percent).", show_default=False)
]
MethodOption = Annotated[Method, typer.Option("--method", help="How attention is scored.")]
NormOption = Annotated[
    Norm | None,
    typer.Option(
        "--norm", help="fold: each FFN keeps its own norm gain; last: one for all.", show_default="what measures better"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options of every command that measures a model on text."""

    model_dir: ModelDir
    text: Text = None
    suffix: Suffix = None
    length: Length = 256
    batch: Batch = 8
    sequences: Sequences = 32
    device: Device = "auto"
    dtype: DTypeOption = DType.auto
    seed: Seed = 0
    results: Results = Path("fxfusion_results")
    as_json: AsJson = False
    dry_run: DryRun = False
    overwrite: Overwrite = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """What one group may be."""

    max_members: MaxMembers = None
    max_width: MaxWidth = None
    max_bytes: MaxBytes = None
    max_dependency: MaxDependency = None

    def arguments(self) -> dict[str, Any]:
        """As `make_plan` takes them."""
        room = None if self.max_bytes is None else read_bytes(self.max_bytes, "--max-bytes")
        return {
            "max_members": self.max_members,
            "max_width": self.max_width,
            "max_bytes": room,
            "max_dependency": self.max_dependency,
        }


def check_folder(folder: Path) -> None:
    """Raises `FxFusionError` where there is no config.json."""
    if not (folder / "config.json").is_file():
        what = "no such folder" if not folder.is_dir() else "the folder has no config.json"
        raise FxFusionError(f"{folder}: {what}; give the local folder of a model (nothing is downloaded)")


def check_output(out: Path, overwrite: bool, *reads: Path | None) -> None:
    """Raises where a model folder cannot go there, before long work: over what is read, or over what is not ours."""
    from fxfusion.checkpoints.folder import check_replaceable
    from fxfusion.files import check_apart

    check_apart(out, [read for read in reads if read is not None], OptionError)
    check_replaceable(out, overwrite=overwrite)


def check_format(folder: Path, format: str) -> None:
    """Raises where a model cannot be written in that layout, by its config alone: before hours of work on it."""
    from fxfusion.cli.inputs import build_without_weights, is_nemotron

    if format == "canonical":
        if is_nemotron(folder):
            raise OptionError(
                f"--format canonical: {folder} is in the nemotron-nas layout, which has no canonical form"
            )
        return
    from fxfusion.checkpoints.nemotron_nas.export import plan_export

    plan_export(build_without_weights(folder), check=False)


def check_intact(folder: Path) -> None:
    """Plain transformers would load a canonical folder of a changed model, too, but not as that model. A nemotron-nas
    folder holds what it is.
    """
    from fxfusion.checkpoints.canonical_load import PLAN, read_plan
    from fxfusion.checkpoints.reading import SafeFolder
    from fxfusion.cli.inputs import is_nemotron

    if is_nemotron(folder):
        return
    known = read_plan(SafeFolder.of(folder))
    if known is not None and (known.groups or known.dropped_attention or known.refit):
        was = "refitted" if known.refit else "fused, or lost attention,"
        raise FxFusionError(f"{folder} was {was} already ({PLAN}): give the folder of the model as it was")


def read(text: str | None, reader: Callable[[str], T]) -> T | None:
    """What an option's text means; None where it was not given."""
    return None if text is None else reader(text)


def read_layers(text: str, option: str) -> list[int]:
    """`"4-6,8"` -> `[4, 5, 6, 8]`. Raises `OptionError` that names the option and the text."""
    layers = [layer for part in text.split(",") for layer in _read_range(part, text, option)]
    repeated = next((layer for layer in layers if layers.count(layer) > 1), None)
    if repeated is not None:
        raise OptionError(f"{option}: layer {repeated} is named twice in {text!r}")
    return layers


def _read_range(part: str, whole: str, option: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise OptionError(f"{option}: expected layers such as 4-8 or 4,5,6, got {whole!r}")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise OptionError(f"{option}: the range {part.strip()} of {whole!r} runs backwards")
    return numbers


def show_layers(layers: Sequence[int]) -> str:
    """`[4, 5, 6, 8]` -> `"4-6,8"`, as `read_layers` reads it."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def show_members(group: Sequence[int | str]) -> str:
    """The members of a group: layers, or module paths."""
    layers = [member for member in group if isinstance(member, int)]
    return show_layers(layers) if len(layers) == len(group) else ",".join(map(str, group))


def read_share(text: str, option: str) -> float:
    """`"0.05"` or `"5%"` -> `0.05`."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise OptionError(f"{option}: expected a number such as 0.05 or 5%, got {text!r}") from None
    if not 0 <= value < float("inf"):
        raise OptionError(f"{option}: expected a number from 0 on, got {text!r}")
    return value


def read_drop(text: str) -> int | float:
    """How many attention layers: `"5"` -> `5`; which part of them: `"0.4"` or `"40%"` -> `0.4`."""
    if text.strip().isdecimal():
        return int(text)
    value = read_share(text, "--drop")
    if value > 1:
        raise OptionError(f"--drop: expected a whole number of layers or a part such as 0.4 or 40%, got {text!r}")
    return value


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_bytes(text: str, option: str) -> int:
    """`"256M"` -> `268435456`; K, M, G, T are powers of 1024."""
    compact = text.strip().upper().removesuffix("B").removesuffix("I")
    number = compact.rstrip("KMGT")
    unit = compact[len(number) :]
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise OptionError(f"{option}: expected bytes such as 1000000, 256M or 2G, got {text!r}") from None
    if not 1 <= value < 2**63:
        raise OptionError(f"{option}: expected at least one byte, got {text!r}")
    return int(value)
