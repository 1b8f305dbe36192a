"""`fxfusion refit MODEL_DIR OUT_DIR --plan FILE --text PATH`: a folder of the fused model, refitted in closed form."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.conversion import Format, OutDir, Plan, ShardSize
from fxfusion.cli.fuse import FormatOption, say_plan
from fxfusion.cli.options import check_format, check_intact, read_bytes, show_layers
from fxfusion.cli.results_folder import contents, digest
from fxfusion.cli.session import Session, Work, measuring_with
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from fxfusion.plan.record import Refit


class Reference(str, Enum):
    """What is refitted to."""

    intact = "intact"
    unfused = "unfused"


class Later(str, Enum):
    """What is refitted beside the groups."""

    none = "none"
    ffn = "ffn"
    all = "all"


Validation = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="Text that decides; may be repeated.", show_default="an eighth of --text"),
]
ReferenceOption = Annotated[
    Reference, typer.Option("--reference", help="intact: the model as it is; unfused: without the dropped attention.")
]
LaterOption = Annotated[
    Later, typer.Option("--later", help="Beside the groups: none, later FFNs (ffn), or attention outputs too (all).")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="For sums and solutions, such as 2G.", show_default="half of what is free"),
]


@measuring_with(sequences=256)
def command(
    run: Session,
    out_dir: OutDir,
    plan: Plan = None,
    validation: Validation = None,
    reference: ReferenceOption = Reference.intact,
    later: LaterOption = Later.all,
    memory_limit: MemoryLimit = None,
    format: FormatOption = Format.canonical,
    max_shard_size: ShardSize = "2GB",
) -> dict[str, Any]:
    """Drop attention and fuse FFNs as a plan says, refit what writes to the residual stream, and write the result.

    Repairs in closed form, from calibration text, what dropping and fusing cost: no training, no change of shapes or
    speed. A layer is changed only where that helps on text that was not fitted to. MODEL_DIR stays as it is; a run that
    was stopped goes on from --results.
    """
    from fxfusion.plan.fusion_plan import FusionPlan

    if plan is None:
        raise OptionError("--plan: give the plan file that says what to drop and to fuse (`fxfusion plan` makes one)")
    chosen = FusionPlan.load(plan)
    check_intact(run.common.model_dir)
    run.check_output(out_dir, plan, *(validation or ()))
    check_format(run.common.model_dir, format.value)
    limit = None if memory_limit is None else read_bytes(memory_limit, "--memory-limit")
    run.require_text()
    result = {
        "model": str(run.common.model_dir),
        "out": str(out_dir),
        "format": format.value,
        "reference": reference.value,
        "later": later.value,
    }
    if run.common.dry_run:
        work = [Work("loss of the intact model", 1), Work("sums for each projection, in both models")]
        return result | run.plan_dry_run(work, [out_dir])
    found = _refit(run, chosen, reference.value, later.value, validation, limit)
    record = _show(run, found)
    write_refitted(run, found, chosen, out_dir, format, max_shard_size)
    run.screen.line(f"written: {out_dir}")
    return result | {"dry_run": False, "refit": record.model_dump(mode="json")}


def _refit(
    run: Session, plan: Any, reference: str, later: str, validation: list[Path] | None, limit: int | None
) -> Any:
    decides = None if validation is None else run.read_text(validation)
    model = run.model
    sources = [str(path) for path in validation or ()]
    key = digest([contents(plan), reference, later, run.text_facts, sources])
    say_plan(run, plan)
    from fxfusion.recovery.refit import refit

    return refit(
        model,
        plan,
        run.batches,
        reference,
        validation=decides,
        later=later,
        memory_limit=limit,
        cache=run.folder.file(f"refit_{key}"),
        progress=run.screen.notes.is_terminal,
    )


def _show(run: Session, model: Any) -> Refit:
    from fxfusion.models.drop_record import read_refit

    record = read_refit(model.config)
    assert record is not None
    rows = [
        (
            fit.name,
            show_layers(fit.layers),
            "-" if fit.penalty is None else f"{fit.penalty:g}",
            f"{fit.before:.3f}",
            f"{fit.after:.3f}",
            "yes" if fit.applied else "no",
        )
        for fit in record.fits
    ]
    run.screen.table(("projection", "layers", "penalty", "error before", "after", "applied"), rows)
    run.screen.line(
        f"loss on {record.held_out_tokens:,} tokens that were not fitted to: {record.loss_before:.4g} before, "
        f"{record.loss_after:.4g} after ({record.tokens:,} calibration tokens)"
    )
    return record


def write_refitted(
    run: Session,
    model: Any,
    plan: Any,
    out_dir: Path,
    format: Format,
    max_shard_size: str = "2GB",
    card: dict[str, Any] | None = None,
) -> None:
    """The folder's own tensors but for those that were refitted, in the dtype that it stores."""
    import torch

    from fxfusion.checkpoints.api import from_pretrained, save_pretrained
    from fxfusion.models.drop_record import read_refit
    from fxfusion.recovery.refit import refitted_parameters

    loud = run.screen.notes.is_terminal
    stored = from_pretrained(run.common.model_dir, progress=loud)
    with torch.no_grad():
        for name, value in refitted_parameters(model):
            parameter: Tensor = stored.get_parameter(name)
            parameter.copy_(value)
    with run.screen.busy("writing, and proving the fused form"):
        save_pretrained(
            stored,
            out_dir,
            format.value,
            plan=plan.replace(refit=read_refit(model.config)),
            card=card,
            max_shard_size=max_shard_size,
            progress=loud,
            overwrite=run.common.overwrite,
        )
