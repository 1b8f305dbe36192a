"""`fxfusion fuse`, `export` and `unfuse`: from one model to the folder of another."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import Format, GgufType, Quantize, check_model, check_output, show_layers, show_members
from fxfusion.cli.results_folder import QUALITY, ResultsFolder, contents
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import Conversion, Run, command
from fxfusion.errors import FxFusionError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfusion.plan.fusion_plan import FusionPlan

Measured = Annotated[
    Path | None,
    typer.Option(
        "--results", metavar="FOLDER", help="Put what `eval` measured there into the card.", show_default=False
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option("--quantize", help="Linear layers of the layers as integers (torchao).", show_default=False),
]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", min=1, help="Inputs that share a scale.", show_default="32")
]
_MEASURES = ("perplexity", "kl", "top1", "top5")  # of the card


# --- commands -----------------------------------------------------------------------------------------


@command
def fuse(
    run: Conversion,
    output: options.Output,
    plan: options.NeededPlan,
    format: options.FormatOption = Format.canonical,
    results: Measured = None,
    max_shard_size: options.ShardSize = "2GB",
    gguf_type: options.GgufTypeOption = GgufType.auto,
) -> dict[str, Any]:
    """Drop attention and fuse FFNs as a plan says, prove it, and write the result as a model folder or file.

    A canonical folder has the original weights, bit for bit, and the plan: plain transformers loads it as the
    unfused model, fxfusion.from_pretrained as the fused one. MODEL stays as it is.
    """
    chosen, result = fxfusion.FusionPlan.load(plan), _started(run, output, plan, results) | {"format": format.value}
    from fxfusion.cli import inputs

    inputs.check_format(run.model_dir, format, chosen, output=output, gguf_type=gguf_type)
    card = _card(results, chosen)
    say_plan(run, chosen)
    if run.dry_run:
        return result | outline(run, chosen, format, max_shard_size, gguf_type)
    model = run.load()
    before = _told(run, "before", model)
    if format is not Format.canonical:
        with run.screen.busy("fusing"):
            fxfusion.fuse(model, chosen)
    more = {"plan": chosen if format is Format.canonical else None, "gguf_type": inputs.read_type(gguf_type)}
    _write(run, model, output, format, max_shard_size, card=card, **more)
    return result | {"before": before, "after": _told(run, "after", model, output, format)}


@command
def export(
    run: Conversion,
    output: options.Output,
    plan: options.PlanFile = None,
    results: Measured = None,
    max_shard_size: options.ShardSize = "2GB",
    format: options.FormatOption = Format.nemotron_nas,
    gguf_type: options.GgufTypeOption = GgufType.auto,
    quantize: QuantizeOption = None,
    group_size: GroupSize = None,
) -> dict[str, Any]:
    """Write a model with its fused FFNs as ordinary wide ones, for engines, and say who loads it.

    MODEL is a canonical folder with its plan, or any Llama-like model, fused by --plan first. With --dry-run
    prints config and tensor index (all of it under --json); no weights are read, so any size is quick.
    """
    if format is Format.canonical:
        raise OptionError("--format canonical: engines do not load the fused form of it; `fxfusion fuse` writes it")
    chosen = None if plan is None else fxfusion.FusionPlan.load(plan)
    result = _started(run, output, plan, results)
    from fxfusion.cli import inputs

    rounding: dict[str, Any] = {"quantize": quantize and quantize.value, "group_size": group_size}
    inputs.check_rounding(run.model_dir, format, chosen, **rounding)
    inputs.check_format(run.model_dir, format, output=output, gguf_type=gguf_type)
    if run.dry_run:
        return result | outline(run, chosen, format, max_shard_size, gguf_type)
    from fxfusion.models.ffn_surgery.record import plan_of

    model = run.load()
    if chosen is not None:
        with run.screen.busy("fusing"):
            fxfusion.fuse(model, chosen)
    more = {"card": _card(results, plan_of(model)), "gguf_type": inputs.read_type(gguf_type), **rounding}
    _write(run, model, output, format, max_shard_size, **more)
    engines = engines_of(output)
    say_engines(run.screen, engines)
    return result | {"after": _told(run, "exported", model, output, format), "engines": engines}


@command
def unfuse(run: Conversion, output: options.Output, max_shard_size: options.ShardSize = "2GB") -> dict[str, Any]:
    """Take the fused groups out of a folder: the model's weights from before, in a canonical folder.

    They are there bit for bit in a canonical folder, and come out of a nemotron-nas folder that fxfusion wrote: bit for
    bit where norms were not folded, to rounding where they were. Dropped attention stays dropped: its weights are gone.
    """
    result = _started(run, output)
    from fxfusion.checkpoints.canonical_load import PLAN
    from fxfusion.cli import inputs

    plan = inputs.stored_plan(run.model_dir)
    if plan is None:
        raise FxFusionError(f"{run.model_dir} has no {PLAN}: nothing says what was fused, or what its members were")
    if not plan.groups:
        raise FxFusionError(f"{run.model_dir}: nothing is fused in it, by its plan")
    say_plan(run, plan)
    if run.dry_run:
        run.screen.line(f"dry run: would write {output} with {len(plan.groups)} groups taken apart")
        return result | {"groups": [group.to_data() for group in plan.groups]}
    model = run.load(fused=False)
    _write(run, model, output, inputs.format_of(model), max_shard_size)
    return result | {"after": _told(run, "after", model, output)}


def _started(run: Conversion, output: Path, *reads: Path | None) -> dict[str, Any]:
    """What every result begins with, where the folders are fit to be read and written."""
    check_model(run.model_dir)
    check_output(output, run.overwrite, run.model_dir, *reads)
    return {"model": str(run.model_dir), "output": str(output), "dry_run": run.dry_run}


def _write(
    run: Conversion, model: PreTrainedModel, output: Path, format: Format, max_shard_size: str, **more: Any
) -> None:
    loud = run.screen.notes.is_terminal
    with run.screen.busy("writing, and proving what is written"):
        fxfusion.save_pretrained(
            model,
            output,
            format.value,
            max_shard_size=max_shard_size,
            progress=loud,
            overwrite=run.overwrite,
            **more,
        )


def _told(
    run: Conversion,
    name: str,
    model: PreTrainedModel,
    written: Path | None = None,
    format: Format = Format.canonical,
) -> dict[str, Any]:
    """What a model is, told on a line."""
    found = facts(model)
    show(run.screen, name, found)
    if written is not None:
        run.screen.line(f"written: {written}")
        say_how_to_run(run.screen, written, format)
    return found


def outline(
    run: Conversion,
    plan: FusionPlan | None,
    format: Format,
    max_shard_size: str,
    gguf_type: GgufType = GgufType.auto,
) -> dict[str, Any]:
    """What would be written, from config and plan alone: the fused model on the meta device in facts, and for the
    engines' layout config, index and who loads it."""
    from fxfusion.cli import inputs
    from fxfusion.models.ffn_surgery.fuse import fuse

    path = run.model_dir
    run.tell_read(path)
    with run.screen.busy("looking at the layers"):
        # such a folder holds the fused form itself
        fused_already = inputs.is_nemotron(path) or inputs.lists_layers(path)
        model: Any = inputs.build_without_weights(path, changed=False)
        before = facts(model)
        chosen = plan or (None if fused_already else inputs.stored_plan(path))
        if chosen is not None:
            fuse(model, chosen)
    after = facts(model)
    show(run.screen, "before", before)
    show(run.screen, "after", after)
    found: dict[str, Any] = {"before": before, "after": after}
    if format is not Format.canonical:
        found["export"], count, size = _outlined(run, model, format, max_shard_size, gguf_type)
        run.screen.line(f"would write {count} tensors, {size / 2**20:,.1f} MiB")
    return found


def _outlined(
    run: Conversion, model: Any, format: Format, max_shard_size: str, gguf_type: GgufType
) -> tuple[dict[str, Any], int, int]:
    """What a format would have of a model, and how many tensors and bytes."""
    from fxfusion.checkpoints.llama_cpp.export import GgufExport
    from fxfusion.checkpoints.nemotron_nas.export import plan_export
    from fxfusion.checkpoints.per_layer.any_model import AnyModelPlan
    from fxfusion.checkpoints.per_layer.export import ExportPlan
    from fxfusion.cli import inputs

    if format is Format.gguf:
        file = GgufExport.of(model, inputs.read_type(gguf_type))
        run.screen.line(file.rounded or "")
        return file.to_dict(), len(file.types), file.nbytes
    if format is Format.nemotron_nas:
        exported = plan_export(model, max_shard_size=max_shard_size)
        say_engines(run.screen, exported.engines)
        return exported.to_dict(), len(exported.tensors), exported.nbytes
    key = "per_layer_config" if format is Format.transformers else "block_configs"
    written: Any = (ExportPlan if format is Format.transformers else AnyModelPlan).of(model)
    return {key: written.config[key], "bytes": written.nbytes}, len(written.tensors), written.nbytes


# --- what is told -------------------------------------------------------------------------------------


def facts(model: Any) -> dict[str, Any]:
    """A model in numbers, for people and for JSON."""
    from fxfusion.models.ffn_surgery.record import plan_of
    from fxfusion.models.fingerprint import decoder_layers

    plan = plan_of(model)
    weights = {id(value): value for value in model.parameters()}.values()
    return {
        "architecture": type(model).__name__,
        "layers": len(decoder_layers(model)[1]),
        "parameters": sum(value.numel() for value in weights),
        "bytes": sum(value.numel() * value.element_size() for value in weights),
        "dropped_attention": list(plan.dropped_attention),
        "groups": [group.to_data() for group in plan.groups],
        "norm": plan.norm,
        **({"removed": list(plan.removed)} if plan.removed else {}),
    }


def show(screen: Screen, name: str, found: dict[str, Any]) -> None:
    """One line on a model."""
    size = f"{found['parameters']:,} parameters, {found['bytes'] / 2**20:,.1f} MiB"
    screen.line(f"{name}: {found['architecture']}, {found['layers']} layers, {size}")


def say_plan(run: Run, plan: FusionPlan) -> None:
    """What a plan does, in one line each."""
    if plan.dropped_attention:
        run.screen.line(f"attention dropped: layers {show_layers(plan.dropped_attention)}")
    if plan.removed:
        run.screen.line(f"removed: layers {show_layers(plan.removed)}")
    if plan.groups:
        run.screen.line(f"FFNs fused: {'; '.join(show_members(group) for group in plan.groups)} (norm {plan.norm})")


def engines_of(written: Path) -> dict[str, str | None]:
    """For each engine None where it loads a folder or GGUF file, else why not; nothing of canonical folders."""
    from fxfusion.checkpoints.gguf.header import is_gguf
    from fxfusion.checkpoints.nemotron_nas import export as nemotron
    from fxfusion.checkpoints.nemotron_nas.load import read_config
    from fxfusion.checkpoints.per_layer import export as per_layer
    from fxfusion.checkpoints.quantised import engines_of_quantised
    from fxfusion.checkpoints.reading import SafeFolder
    from fxfusion.cli.inputs import is_nemotron

    if is_gguf(written):
        return {"llama.cpp": None}
    config = SafeFolder.of(written).json("config.json")
    if is_nemotron(written):
        if config.pop("quantization_config", None):
            return engines_of_quantised(nemotron.engines_that_load(config))
        return nemotron.engines_that_load(read_config(SafeFolder.of(written)))
    return per_layer.engines_that_load(config) if per_layer.is_ours(config) else {}


def say_how_to_run(screen: Screen, written: Path, format: Format) -> None:
    """What to type in each engine that loads it, as `tests/engines` did."""
    from fxfusion.checkpoints.companions import how_to_run

    for engine, why in engines_of(written).items():
        if why is None:
            text = how_to_run(format.value, engine, written).rstrip().replace("\n\n", "\n")
            screen.line(f"in {engine}:\n{textwrap.indent(text, '    ')}")
    if format is Format.gguf:
        screen.line(f"or: llama-cli -m {written}, and whatever else is built on llama.cpp")


def say_engines(screen: Screen, engines: dict[str, str | None]) -> None:
    """Which engines load what was written, by their own rules."""
    if engines:
        screen.table(("engine", "loads it"), [(name, why or "yes") for name, why in engines.items()])


def _card(results: Path | None, plan: FusionPlan) -> dict[str, Any] | None:
    """Fields of a model card; None without a folder. Raises `OptionError` where it knows nothing of this plan."""
    if results is None:
        return None
    latest = (ResultsFolder(results).read(QUALITY) or {}).get("latest")
    if not latest:
        raise OptionError(f"--results: {results} has no measured quality: run `fxfusion eval` with it first")
    if latest.get("refitted") and plan.refit is None:
        raise OptionError(f"--results: what was measured in {results} is the plan after a refit; run `fxfusion eval`")
    if latest["plan_contents"] != contents(plan):
        raise OptionError(
            f"--results: what was measured in {results} is another plan; run `fxfusion eval` with this one"
        )
    quality = {
        f"{measure}, {name}": "{value:.4g} [{low:.4g}, {high:.4g}]".format(**found[measure])
        for name, found in latest["quality"].items()
        for measure in _MEASURES
        if found.get(measure) is not None
    }
    text = latest["text"]
    quality["text"] = f"{text['tokens']:,} tokens of {', '.join(Path(source).name for source in text['sources'])}"
    return {"quality": quality}
