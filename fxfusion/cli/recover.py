"""`fxfusion refit` and `recover MODEL --output DIR`: a fused model made good in closed form, or by training."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.fuse import say_how_to_run, say_plan
from fxfusion.cli.options import DType, Format, GgufType, check_model, read, read_bytes, show_layers
from fxfusion.cli.results_folder import contents, digest
from fxfusion.cli.session import Session, Work, command
from fxfusion.errors import FxFusionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfusion.models.weight_grid import WeightGrid
    from fxfusion.plan.fusion_plan import FusionPlan
    from fxfusion.plan.record import Refit
    from fxfusion.recovery.distil import Step

RECOVERY = "recover"  # in the results folder


class Reference(str, Enum):
    """What is refitted to."""

    intact = "intact"
    unfused = "unfused"


class Later(str, Enum):
    """What is refitted beside the groups."""

    none = "none"
    ffn = "ffn"
    all = "all"


class Sides(str, Enum):
    """Which ends of the blocks are refitted."""

    both = "both"
    out = "out"


Validation = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="Text that decides; may be repeated.", show_default="an eighth of --text"),
]
RefitReference = Annotated[
    Reference, typer.Option("--reference", help="intact: the model as it is; unfused: without the dropped attention.")
]
LaterOption = Annotated[
    Later, typer.Option("--later", help="Beside the groups: none, later FFNs (ffn), or attention outputs too (all).")
]
SidesOption = Annotated[
    Sides,
    typer.Option("--sides", help="both: what reads the stream (gate, up, q, k, v) too; out: what adds to it."),
]
GridOption = Annotated[
    str | None,
    typer.Option(
        "--grid",
        metavar="int4:GROUP|int8:GROUP",
        help="Fit to what `export --quantize` stores (int4:32: gguf's q4_0 too), errors fed back (GPTQ).",
        show_default=False,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="For sums and solutions, such as 2G.", show_default="half of what is free"),
]


IntactDir = Annotated[Path, typer.Option("--reference", metavar="MODEL", help="The intact model.")]
Steps = Annotated[int, typer.Option(min=1, help="Of the optimiser, a batch each.")]
Rate = Annotated[
    float | None, typer.Option("--learning-rate", help="The largest.", show_default="1e-4, with --lora 5e-4")
]
Lora = Annotated[
    int | None,
    typer.Option(min=1, metavar="RANK", help="Train adapters of this rank, and add them to the weights at the end."),
]
Precision = Annotated[
    DType, typer.Option("--precision", help="What products are computed in; auto: as the weights are.")
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice rather than keep them.")
]
Every = Annotated[int, typer.Option(min=1, help="Steps after which the run is measured and written down.")]


# --- refit --------------------------------------------------------------------------------------------


@command(sequences=256)
def refit(
    run: Session,
    output: options.Output,
    plan: options.NeededPlan,
    validation: Validation = None,
    reference: RefitReference = Reference.intact,
    later: LaterOption = Later.all,
    sides: SidesOption = Sides.both,
    grid: GridOption = None,
    memory_limit: MemoryLimit = None,
    format: options.FormatOption = Format.canonical,
    max_shard_size: options.ShardSize = "2GB",
    gguf_type: options.GgufTypeOption = GgufType.auto,
) -> dict[str, Any]:
    """Drop attention and fuse FFNs as a plan says, refit what reads and writes the stream, and write the result.

    Repairs in closed form, from calibration text, what dropping and fusing cost: no training, no change of shapes or
    speed. A layer is changed only where that helps on text that was not fitted to. MODEL stays as it is; a run that
    was stopped goes on from --results.
    """
    chosen = fxfusion.FusionPlan.load(plan)
    limit = read(memory_limit, read_bytes, "--memory-limit")
    on = read(grid, _read_grid, "--grid")
    layout = partial(_check_format, run.model_dir, format, chosen, output=output, gguf_type=gguf_type)
    run.check(output=output, reads=[plan, *(validation or ())], intact=True, layout=layout)
    result: dict[str, Any] = {
        "model": str(run.model_dir),
        "output": str(output),
        "format": format.value,
        "reference": reference.value,
        "later": later.value,
        "sides": sides.value,
        **({} if on is None else {"grid": str(on)}),
    }
    if run.dry_run:
        work = [Work("loss of the intact model", 1), Work("sums for each block, in both models")]
        return result | run.plan_dry_run(work, [output])
    how: dict[str, Any] = {name: result[name] for name in ("reference", "later", "sides", "grid") if name in result}
    found = _refit(run, chosen, how, validation, limit)
    record = _show_fits(run, found)
    write_refitted(run, found, chosen, output, format, max_shard_size, gguf_type=gguf_type)
    run.screen.line(f"written: {output}")
    say_how_to_run(run.screen, output, format)
    return result | {"dry_run": False, "refit": record.model_dump(mode="json")}


def _read_grid(text: str, option: str) -> WeightGrid:
    from fxfusion.models.weight_grid import WeightGrid  # which loads torch

    return WeightGrid.parse(text, option)


def _check_format(*arguments: Any, **options: Any) -> None:
    from fxfusion.cli.inputs import check_format  # which loads torch

    check_format(*arguments, **options)


def _refit(
    run: Session, plan: FusionPlan, how: dict[str, Any], validation: list[Path] | None, limit: int | None
) -> Any:
    decides = None if validation is None else run.read_text(validation)
    model = run.model
    sources = [str(path) for path in validation or ()]
    key = digest([contents(plan), *how.values(), run.text_facts, sources])
    say_plan(run, plan)
    return fxfusion.refit(
        model,
        plan,
        run.batches,
        **how,
        validation=decides,
        memory_limit=limit,
        cache=run.folder.file(f"refit_{key}"),
        progress=True,
    )


def _show_fits(run: Session, model: Any) -> Refit:
    from fxfusion.models.drop_record import read_refit

    record = read_refit(model.config)
    assert record is not None
    rows = [
        (
            fit.name,
            fit.side,
            show_layers(fit.layers),
            "-" if fit.penalty is None else f"{fit.penalty:g}",
            f"{fit.before:.3f}",
            f"{fit.after:.3f}",
            "yes" if fit.applied else "no",
        )
        for fit in record.fits
    ]
    run.screen.table(("layer", "side", "layers", "penalty", "error before", "after", "applied"), rows)
    run.screen.line(
        f"loss on {record.held_out_tokens:,} tokens that were not fitted to: {record.loss_before:.4g} before, "
        f"{record.loss_after:.4g} after ({record.tokens:,} calibration tokens)"
    )
    return record


def write_refitted(
    run: Session,
    model: PreTrainedModel,
    plan: FusionPlan,
    output: Path,
    format: Format,
    max_shard_size: str = "2GB",
    card: dict[str, Any] | None = None,
    gguf_type: GgufType = GgufType.auto,
) -> None:
    """The folder's own tensors but for those that were refitted, in the dtype that it stores."""
    import torch

    from fxfusion.cli.inputs import read_type
    from fxfusion.models.drop_record import read_refit
    from fxfusion.recovery.refit import refitted_parameters

    loud = run.screen.notes.is_terminal
    stored = fxfusion.from_pretrained(run.model_dir, progress=loud)
    with torch.no_grad():
        for name, value in refitted_parameters(model):
            stored.get_parameter(name).copy_(value)
    with run.screen.busy("writing, and proving the fused form"):
        fxfusion.save_pretrained(
            stored,
            output,
            format.value,
            plan=plan.replace(refit=read_refit(model.config)),
            card=card,
            gguf_type=read_type(gguf_type),
            max_shard_size=max_shard_size,
            progress=loud,
            overwrite=run.overwrite,
        )


# --- recover ------------------------------------------------------------------------------------------


@command
def recover(
    run: Session,
    reference: IntactDir,
    output: options.Output,
    steps: Steps = 500,
    learning_rate: Rate = None,
    lora: Lora = None,
    precision: Precision = DType.auto,
    gradient_checkpointing: Checkpointing = False,
    every: Every = 25,
) -> dict[str, Any]:
    """Train a fused model (canonical or nemotron-nas folder) to predict as the intact one does: KL, AdamW.

    An eighth of the text decides which weights are kept; where none are better than at the start, nothing is written.
    Take much text (--sequences 2000), and refit first. A run that is stopped goes on in the same --results.
    """
    check_model(run.model_dir)
    intact = replace(run, model_dir=reference)
    intact.check(output=output, reads=[run.model_dir], intact=True)
    from fxfusion.cli import inputs

    inputs.causal_config(run.model_dir)  # what cannot be read is said before the intact model is loaded
    if inputs.is_nemotron(run.model_dir):
        inputs.check_format(run.model_dir, Format.nemotron_nas)
    if run.dry_run:
        what = f"{steps} steps, forward and backward, of {run.model_dir}"
        return intact.plan_dry_run([Work(what)], [output, RECOVERY])
    chosen: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "lora": lora, "every": every}
    chosen |= {"seed": run.seed, "precision": precision.value, "gradient_checkpointing": gradient_checkpointing}
    return _recover(run, intact, output, chosen)


def _recover(run: Session, intact: Session, output: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    from fxfusion.cli.inputs import format_of
    from fxfusion.recovery.recover import RECORD

    batches, teacher = intact.batches, intact.model
    folder, shown = run.model_dir, run.screen.notes.is_terminal
    with run.screen.busy(f"loading {folder}"):
        model = fxfusion.from_pretrained(folder, dtype=teacher.dtype, device=intact.torch_device)
    curve: list[dict[str, Any]] = []

    def tell(step: Step) -> None:
        curve.append({"step": step.step, "kl": step.loss, "validation": step.validation})
        if step.validation is not None and not shown:
            run.screen.note(f"step {step.step}: KL {step.loss:.4f}, on the text for validation {step.validation:.4f}")

    fxfusion.recover(model, batches, teacher, **chosen, cache=run.folder.file(RECOVERY), progress=shown, on_step=tell)
    found = (getattr(model.config, "fxfusion", None) or {}).get(RECORD)
    if found is None:
        raise FxFusionError("nothing was better than the start on the text for validation, so nothing is written")
    card = {"notes": f"Distilled from the intact model over {found['steps']} steps (KL on {found['tokens']:,} tokens)."}
    more: dict[str, Any] = {"progress": shown, "overwrite": run.overwrite}
    form: Any = format_of(model).value
    fxfusion.save_pretrained(model, output, form, tokenizer=intact.tokenizer_if_any, card=card, **more)
    rows = [(name, f"{found[f'{name}_before']:.4f}", f"{found[f'{name}_after']:.4f}") for name in ("kl", "loss")]
    run.screen.table(("on the text for validation [nats per token]", "before", "after"), rows)
    run.screen.line(f"written: {output}")
    return {"model": str(folder), "output": str(output), **found, "curve": curve}
