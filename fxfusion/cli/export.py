"""`fxfusion export MODEL_DIR OUT_DIR`: a folder in the layout that serving engines load."""

from __future__ import annotations

from typing import Any

from fxfusion.cli.card import Measured, card_of
from fxfusion.cli.conversion import (
    Conversion,
    DryRun,
    Format,
    OutDir,
    Plan,
    ShardSize,
    converting,
    facts,
    say_engines,
    show,
)
from fxfusion.cli.options import ModelDir, check_folder, check_format, check_output


@converting
def command(
    run: Conversion,
    model_dir: ModelDir,
    out_dir: OutDir,
    plan: Plan = None,
    results: Measured = None,
    max_shard_size: ShardSize = "2GB",
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Write a model in the nemotron-nas layout, with its fused FFNs as ordinary wide ones, and say who loads it.

    MODEL_DIR is a canonical folder with its plan, or any Llama-like model, fused by --plan first. With --dry-run
    prints config and tensor index (all of it under --json); no weights are read, so any size is quick.
    """
    check_folder(model_dir)
    check_output(out_dir, run.overwrite, model_dir, plan, results)
    check_format(model_dir, Format.nemotron_nas.value)
    from fxfusion.plan.fusion_plan import FusionPlan

    chosen = None if plan is None else FusionPlan.load(plan)
    result = {"model": str(model_dir), "out": str(out_dir), "dry_run": dry_run}
    if dry_run:
        from fxfusion.cli.dry_run import fused_without_weights

        return result | fused_without_weights(run, model_dir, chosen, Format.nemotron_nas, max_shard_size)
    from fxfusion.checkpoints.api import save_pretrained
    from fxfusion.checkpoints.nemotron_nas.export import engines_that_load
    from fxfusion.checkpoints.reading import SafeFolder
    from fxfusion.models.ffn_surgery.fuse import fuse
    from fxfusion.models.ffn_surgery.record import plan_of

    model = run.load(model_dir)
    if chosen is not None:
        with run.screen.busy("fusing"):
            fuse(model, chosen)
    after, card = facts(model, plan_of(model)), card_of(results, plan_of(model))
    more: dict[str, Any] = {"progress": run.screen.notes.is_terminal, "overwrite": run.overwrite}
    save_pretrained(model, out_dir, "nemotron-nas", max_shard_size=max_shard_size, card=card, **more)
    show(run.screen, "exported", after)
    engines = engines_that_load(SafeFolder.of(out_dir).json("config.json"))
    say_engines(run.screen, engines)
    run.screen.line(f"written: {out_dir}")
    return {**result, "after": after, "engines": engines}
