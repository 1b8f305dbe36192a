"""`fxfusion unfuse MODEL_DIR OUT_DIR`: a folder of the model with its FFNs one behind the other again."""

from __future__ import annotations

from typing import Any

from fxfusion.cli.conversion import Conversion, DryRun, Format, OutDir, ShardSize, converting, facts, show
from fxfusion.cli.fuse import say_plan
from fxfusion.cli.options import ModelDir, check_folder, check_output
from fxfusion.errors import FxFusionError


@converting
def command(
    run: Conversion,
    model_dir: ModelDir,
    out_dir: OutDir,
    max_shard_size: ShardSize = "2GB",
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Take the fused groups out of a folder: the model's weights from before, in a canonical folder.

    They are there bit for bit in a canonical folder, and come out of a nemotron-nas folder that fxfusion wrote: bit for
    bit where norms were not folded, to rounding where they were. Dropped attention stays dropped: its weights are gone.
    """
    check_folder(model_dir)
    check_output(out_dir, run.overwrite, model_dir)
    from fxfusion.checkpoints.canonical_load import PLAN, read_plan
    from fxfusion.checkpoints.reading import SafeFolder

    plan = read_plan(SafeFolder.of(model_dir))
    if plan is None:
        raise FxFusionError(f"{model_dir} has no {PLAN}: nothing says what was fused, or what its members were")
    if not plan.groups:
        raise FxFusionError(f"{model_dir}: nothing is fused in it, by its plan")
    say_plan(run, plan)
    result = {"model": str(model_dir), "out": str(out_dir), "dry_run": dry_run}
    if dry_run:
        run.screen.line(f"dry run: would write {out_dir} with {len(plan.groups)} groups taken apart")
        return {**result, "groups": [group.to_data() for group in plan.groups]}
    from fxfusion.checkpoints.api import save_pretrained
    from fxfusion.checkpoints.nemotron_nas.load import MODEL_TYPE
    from fxfusion.models.ffn_surgery.record import plan_of

    model = run.load(model_dir, fused=False)
    after = facts(model, plan_of(model))
    form = Format.nemotron_nas if model.config.model_type == MODEL_TYPE else Format.canonical  # one that it came in
    more: dict[str, Any] = {
        "max_shard_size": max_shard_size,
        "progress": run.screen.notes.is_terminal,
        "overwrite": run.overwrite,
    }
    save_pretrained(model, out_dir, form.value, **more)
    show(run.screen, "after", after)
    run.screen.line(f"written: {out_dir}")
    return {**result, "after": after}
