"""What `fuse` and `export` would write, from config and plan alone. Imported when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxfusion.checkpoints.canonical_load import read_plan
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.checkpoints.nemotron_nas.load import MODEL_TYPE, outline_of
from fxfusion.checkpoints.reading import SafeFolder
from fxfusion.cli.conversion import Conversion, Format, facts, say_engines, show
from fxfusion.cli.inputs import build_without_weights
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.plan.fusion_plan import FusionPlan


def fused_without_weights(
    run: Conversion, model_dir: Path, plan: FusionPlan | None, format: Format, max_shard_size: str
) -> dict[str, Any]:
    """The fused model on the meta device: its facts, and for the engines' layout config, index and who loads it."""
    folder = SafeFolder.of(model_dir)
    with run.screen.busy("looking at the layers"):
        is_decilm = folder.json("config.json").get("model_type") == MODEL_TYPE
        model: Any = outline_of(folder) if is_decilm else build_without_weights(model_dir)
        before = facts(model, plan_of(model))
        chosen = plan or (None if is_decilm else read_plan(folder))  # such a folder holds the fused form itself
        if chosen is not None:
            fuse(model, chosen)
    after = facts(model, plan_of(model))
    show(run.screen, "before", before)
    show(run.screen, "after", after)
    found: dict[str, Any] = {"before": before, "after": after}
    if format is Format.nemotron_nas:
        export = plan_export(model, max_shard_size=max_shard_size)
        found["export"] = export.to_dict()
        say_engines(run.screen, export.engines)
        run.screen.line(f"would write {len(export.tensors)} tensors, {export.nbytes / 2**20:,.1f} MiB")
    return found
