"""`fxfusion recover MODEL_DIR --reference INTACT_DIR --output OUT_DIR --text PATH`: a fused model learns again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.options import DType, check_folder, check_format
from fxfusion.cli.session import Session, Work, measuring
from fxfusion.errors import FxFusionError, OptionError

if TYPE_CHECKING:
    from fxfusion.recovery.distil import Step

FOLDER = "recover"  # in the results folder

Reference = Annotated[
    Path | None, typer.Option(metavar="MODEL_DIR", help="The intact model's folder.", show_default=False)
]
Output = Annotated[Path | None, typer.Option(metavar="OUT_DIR", help="Where the new folder goes.", show_default=False)]
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


@measuring
def command(
    run: Session,
    reference: Reference = None,
    output: Output = None,
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
    from fxfusion.cli.inputs import is_nemotron

    if reference is None or output is None:
        raise OptionError(f"--{'reference' if reference is None else 'output'}: give a folder")
    for folder in (run.common.model_dir, reference):
        check_folder(folder)
    run.require_text()
    run.check_output(output, reference)
    if is_nemotron(run.common.model_dir):
        check_format(run.common.model_dir, "nemotron-nas")
    intact = Session(replace(run.common, model_dir=reference))
    if run.common.dry_run:
        what = f"{steps} steps, forward and backward, of {run.common.model_dir}"
        return intact.plan_dry_run([Work(what)], [output, FOLDER])
    chosen: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "lora": lora, "every": every}
    chosen |= {"seed": run.common.seed, "precision": precision.value, "gradient_checkpointing": gradient_checkpointing}
    return _recover(run, intact, output, chosen)


def _recover(run: Session, intact: Session, output: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    from fxfusion.checkpoints.api import from_pretrained, save_pretrained
    from fxfusion.checkpoints.nemotron_nas.load import MODEL_TYPE
    from fxfusion.recovery.recover import RECORD, recover

    batches, teacher = intact.batches, intact.model
    folder, shown = run.common.model_dir, run.screen.notes.is_terminal
    with run.screen.busy(f"loading {folder}"):
        model = from_pretrained(folder, dtype=teacher.dtype, device=intact.device)
    curve: list[dict[str, Any]] = []

    def tell(step: Step) -> None:
        curve.append({"step": step.step, "kl": step.loss, "validation": step.validation})
        if step.validation is not None and not shown:
            run.screen.note(f"step {step.step}: KL {step.loss:.4f}, on the text for validation {step.validation:.4f}")

    recover(model, batches, teacher, **chosen, cache=run.folder.file(FOLDER), progress=shown, on_step=tell)
    found = (getattr(model.config, "fxfusion", None) or {}).get(RECORD)
    if found is None:
        raise FxFusionError("nothing was better than the start on the text for validation, so nothing is written")
    form: Any = "nemotron-nas" if model.config.model_type == MODEL_TYPE else "canonical"
    card = {"notes": f"Distilled from the intact model over {found['steps']} steps (KL on {found['tokens']:,} tokens)."}
    more: dict[str, Any] = {"progress": shown, "overwrite": run.common.overwrite}
    save_pretrained(model, output, form, tokenizer=intact.tokenizer_if_any, card=card, **more)
    rows = [(name, f"{found[f'{name}_before']:.4f}", f"{found[f'{name}_after']:.4f}") for name in ("kl", "loss")]
    run.screen.table(("on the text for validation [nats per token]", "before", "after"), rows)
    run.screen.line(f"written: {output}")
    return {"model": str(folder), "output": str(output), **found, "curve": curve}
