"""`fxfusion fuse MODEL_DIR OUT_DIR --plan FILE`: a folder of the fused model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxfusion.cli.card import Measured, card_of
from fxfusion.cli.conversion import Conversion, DryRun, Format, OutDir, Plan, ShardSize, converting, facts, show
from fxfusion.cli.options import ModelDir, check_folder, check_format, check_output, show_layers, show_members
from fxfusion.cli.session import Session
from fxfusion.errors import OptionError

FormatOption = Annotated[
    Format,
    typer.Option("--format", help="canonical: original weights and the plan; nemotron-nas: fused weights for engines."),
]


@converting
def command(
    run: Conversion,
    model_dir: ModelDir,
    out_dir: OutDir,
    plan: Plan = None,
    format: FormatOption = Format.canonical,
    results: Measured = None,
    max_shard_size: ShardSize = "2GB",
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Drop attention and fuse FFNs as a plan says, prove it, and write the result as a model folder.

    A canonical folder has the original weights, bit for bit, and the plan: plain transformers loads it as the
    unfused model, fxfusion.from_pretrained as the fused one. MODEL_DIR stays as it is.
    """
    from fxfusion.plan.fusion_plan import FusionPlan

    if plan is None:
        raise OptionError("--plan: give the plan file that says what to fuse (`fxfusion plan` makes one)")
    chosen = FusionPlan.load(plan)
    check_folder(model_dir)
    check_output(out_dir, run.overwrite, model_dir, plan, results)
    check_format(model_dir, format.value)
    result = {"model": str(model_dir), "out": str(out_dir), "format": format.value, "dry_run": dry_run}
    card = card_of(results, chosen)
    say_plan(run, chosen)
    if dry_run:
        from fxfusion.cli.dry_run import fused_without_weights

        return result | fused_without_weights(run, model_dir, chosen, format, max_shard_size)
    return result | _write(
        run,
        model_dir,
        out_dir,
        chosen,
        format,
        {"max_shard_size": max_shard_size, "card": card, "overwrite": run.overwrite},
    )


def _write(
    run: Conversion, model_dir: Path, out_dir: Path, plan: Any, format: Format, more: dict[str, Any]
) -> dict[str, Any]:
    from fxfusion.checkpoints.api import save_pretrained
    from fxfusion.models.ffn_surgery.fuse import fuse
    from fxfusion.models.ffn_surgery.record import plan_of

    model = run.load(model_dir)
    before = facts(model, plan_of(model))
    show(run.screen, "before", before)
    more["progress"] = run.screen.notes.is_terminal
    if format is Format.canonical:
        with run.screen.busy("writing, and proving the fused form"):
            save_pretrained(model, out_dir, plan=plan, **more)
    else:
        with run.screen.busy("fusing"):
            fuse(model, plan)
        save_pretrained(model, out_dir, format.value, **more)
    after = facts(model, plan_of(model))
    show(run.screen, "after", after)
    run.screen.line(f"written: {out_dir}")
    return {"before": before, "after": after}


def say_plan(run: Conversion | Session, plan: Any) -> None:
    """What a plan does, in one line each."""
    if plan.dropped_attention:
        run.screen.line(f"attention dropped: layers {show_layers(plan.dropped_attention)}")
    if plan.groups:
        run.screen.line(f"FFNs fused: {'; '.join(show_members(group) for group in plan.groups)} (norm {plan.norm})")
