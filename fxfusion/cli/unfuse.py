"""`fxfusion unfuse MODEL_DIR OUT_DIR`: a folder of the model with its FFNs one behind the other again."""

from __future__ import annotations

from typing import Any

from fxfusion.cli.conversion import Conversion, DryRun, OutDir, ShardSize, converting, facts, show
from fxfusion.cli.fuse import say_plan
from fxfusion.cli.options import ModelDir, check_folder
from fxfusion.errors import FxFusionError


@converting
def command(
    run: Conversion,
    model_dir: ModelDir,
    out_dir: OutDir,
    max_shard_size: ShardSize = "2GB",
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Take the fused groups out of a canonical folder: its weights, bit for bit, without them.

    Attention that was dropped stays dropped: its weights are gone. A nemotron-nas folder has no members to give back.
    """
    check_folder(model_dir)
    from fxfusion.checkpoints.canonical_load import read_plan
    from fxfusion.checkpoints.reading import SafeFolder

    plan = read_plan(SafeFolder.of(model_dir))
    if plan is None or not plan.groups:
        raise FxFusionError(f"{model_dir}: nothing is fused in it, by its plan")
    say_plan(run, plan)
    result = {"model": str(model_dir), "out": str(out_dir), "dry_run": dry_run}
    if dry_run:
        run.screen.line(f"dry run: would write {out_dir} with {len(plan.groups)} groups taken apart")
        return {**result, "groups": [group.to_data() for group in plan.groups]}
    from fxfusion.checkpoints.api import save_pretrained
    from fxfusion.models.ffn_surgery.record import plan_of

    model = run.load(model_dir, fused=False)
    after = facts(model, plan_of(model))
    save_pretrained(model, out_dir, max_shard_size=max_shard_size, progress=run.screen.notes.is_terminal)
    show(run.screen, "after", after)
    run.screen.line(f"written: {out_dir}")
    return {**result, "after": after}
