"""Options that several commands share, each defined once, and how their texts are read.

Read before every `--help`, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fxfusion.cli.profiles import Profile
from fxfusion.errors import FxFusionError, OptionError
from fxfusion.files import check_apart

if TYPE_CHECKING:
    from fxfusion.plan.fusion_plan import FusionPlan

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


class Format(str, Enum):
    """How a model folder is laid out."""

    canonical = "canonical"
    nemotron_nas = "nemotron-nas"
    transformers = "transformers"
    anymodel = "anymodel"
    gguf = "gguf"


class GgufType(str, Enum):
    """What the matrices of a GGUF file are stored as."""

    auto = "auto"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Quantize(str, Enum):
    """What an export makes of linear layers."""

    int8 = "int8"
    int4 = "int4"


class Preset(str, Enum):
    """Rules instead of a budget."""

    paper = "paper"
    automatic = "automatic"


class DType(str, Enum):
    """What the weights are loaded as."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelDir = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A local model folder, or a GGUF file; nothing is downloaded.", show_default=False
    ),
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
NeededPlan = Annotated[
    Path, typer.Option("--plan", help="The plan file: what to drop and to fuse (see `fxfusion plan`).")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        metavar="DIR",
        help="Where the new folder (of format gguf: file) goes; it replaces one that fxfusion wrote.",
    ),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        "--groups",
        metavar="LAYERS",
        help="Layers whose FFNs become one, such as 4-8 or 4-8,10; may be repeated.",
        show_default=False,
    ),
]
CompilerOption = Annotated[
    Compiler, typer.Option("--compiler", help="What compiles the graph; inductor needs a C++ compiler.")
]
StoredDType = Annotated[DType, typer.Option("--dtype", help="auto: as the weights are stored.")]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        help="canonical: original weights and the plan; nemotron-nas: fused weights for engines; transformers: fused "
        "weights for transformers and vLLM, of any family; anymodel: for Model-Optimizer; gguf: one file for llama.cpp "
        "(--output NAME.gguf).",
    ),
]
GgufTypeOption = Annotated[
    GgufType, typer.Option("--gguf-type", help="With --format gguf: type of the matrices; auto: as they are stored.")
]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Of one file of weights at most.")]
DropAttention = Annotated[
    str | None,
    typer.Option(metavar="LAYERS", help="Layers that lose their attention, such as 4-8,10.", show_default=False),
]
MaxPerplexityIncrease = Annotated[
    str | None, typer.Option(metavar="SHARE", help="Against the intact model, such as 5%.", show_default=False)
]
TargetDepth = Annotated[
    int | None,
    typer.Option(min=1, help="FFN depth that remains: FFNs that are computed one after another.", show_default=False),
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
Automatic = Annotated[
    bool,
    typer.Option(
        "--automatic", help="Drop and hoist, after refit, within 1% of the perplexity, the least latency on one H100."
    ),
]
Roads = Annotated[
    str | None,
    typer.Option(
        "--roads",
        metavar="ROADS",
        help="How FFNs may become fewer: some of drop,hoist,wide,remove. Works on models with all attention intact.",
        show_default=False,
    ),
]
AfterRefit = Annotated[
    bool | None,
    typer.Option("--after-refit/--as-is", help="With --roads: judge each plan by its loss after `fxfusion refit`."),
]
MaxWindow = Annotated[
    int | None, typer.Option(min=2, help="With --roads: layers that become one at most.", show_default="6")
]
Hardware = Annotated[
    str | None,
    typer.Option("--hardware", help="What latency is predicted for: h100, h200, ... or a file.", show_default=False),
]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Devices that share every matrix, for the latency.")]
Precision = Annotated[str, typer.Option("--precision", help="Of the weights, for the latency: bf16, fp8, ...")]
MaxLatency = Annotated[
    float | None, typer.Option(metavar="MS", help="Predicted latency of one token at most.", show_default=False)
]
ProfileOption = Annotated[
    Profile,
    typer.Option(
        "--profile",
        help="quick: minutes. Windows of two layers, hoisted, chosen as they are; nine tenths of the FFN depth. "
        "balanced: plans judged after a refit, 65,536 tokens, within 1% of the perplexity. thorough: the same on three "
        "times the text, windows of up to 8 layers. Other options win over it.",
    ),
]
Nearest = Annotated[
    bool, typer.Option("--nearest", help="Where nothing is within the budget, write the plan that comes nearest to it.")
]
MethodOption = Annotated[Method, typer.Option("--method", help="How attention is scored.")]
NormOption = Annotated[
    Norm | None,
    typer.Option(
        "--norm", help="fold: each FFN keeps its own norm gain; last: one for all.", show_default="what measures better"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """What one group may be."""

    max_members: MaxMembers = None
    max_width: MaxWidth = None
    max_bytes: MaxBytes = None
    max_dependency: MaxDependency = None

    def arguments(self) -> dict[str, Any]:
        """As `make_plan` takes them."""
        return {**_values(self), "max_bytes": read(self.max_bytes, read_bytes, "--max-bytes")}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoadOptions:
    """Which roads, and what latency is predicted for."""

    roads: Roads = None
    max_window: MaxWindow = None
    hardware: Hardware = None
    tp: Tp = 1
    precision: Precision = "bf16"
    max_latency: MaxLatency = None

    def arguments(self) -> dict[str, Any]:
        """As `make_plan` takes them."""
        return {**_values(self), "roads": read(self.roads, read_roads, "--roads")}


def _values(given: Any) -> dict[str, Any]:
    return {field.name: getattr(given, field.name) for field in fields(given)}


def check_model(path: Path) -> None:
    """Raises `FxFusionError` where there is neither a folder with a config.json nor a GGUF file that can be read."""
    from fxfusion.checkpoints.gguf.header import SUFFIX, GgufFile, is_gguf

    if is_gguf(path):
        GgufFile.read(path)
    elif not (path / "config.json").is_file():
        what, advice = "no such folder", "give the local folder of a model, or a GGUF file"
        if path.is_file():
            what = "neither a model folder nor a GGUF file"
        elif path.is_dir():
            what, files = "the folder has no config.json", sorted(one.name for one in path.glob(f"*{SUFFIX}"))
            advice = f"to read the GGUF file in it, give {path / files[0]}" if files else advice
        raise FxFusionError(f"{path}: {what}; {advice} (nothing is downloaded)")


def check_output(output: Path, overwrite: bool, *reads: Path | None) -> None:
    """Raises where a model folder or file cannot go there, before long work: over what is read, or what is not ours."""
    from fxfusion.checkpoints.folder import check_replaceable
    from fxfusion.checkpoints.gguf.header import SUFFIX

    if output.suffix.lower() == SUFFIX:
        from fxfusion.checkpoints.llama_cpp.export import check_target

        check_target(output, overwrite=overwrite, reads=tuple(read for read in reads if read is not None))
        return
    check_apart(output, [read for read in reads if read is not None], OptionError)
    check_replaceable(output, overwrite=overwrite)


def read(text: str | None, reader: Callable[[str, str], T], option: str) -> T | None:
    """What an option's text means; None where it was not given."""
    return None if text is None else reader(text, option)


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
        raise OptionError(f"{option}: expected layers such as 4-8,10, got {whole!r}")
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


def read_roads(text: str, option: str) -> list[str]:
    """`"hoist,wide"` -> `["hoist", "wide"]`; the planner knows which there are."""
    return [part.strip() for part in text.split(",")]


def refuse_removed(plan: FusionPlan, command: str) -> None:
    """Raises `OptionError` for a plan that removes layers, where a command compiles the model by it."""
    if plan.removed:
        raise OptionError(
            f"the plan removes layers {show_layers(plan.removed)}, and {command} compiles the model as it is: write "
            "the smaller model by `fxfusion fuse`, and give its folder"
        )


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


def read_drop(text: str, option: str) -> int | float:
    """How many attention layers: `"5"` -> `5`; which part of them: `"0.4"` or `"40%"` -> `0.4`."""
    if text.strip().isdecimal():
        return int(text)
    value = read_share(text, option)
    if value > 1:
        raise OptionError(f"{option}: expected a whole number of layers or a part such as 0.4 or 40%, got {text!r}")
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
