"""Before long work: what would be written, made and read again on the meta device. Imported when it is used.

For each road a first window is fused in a model without weights, laid out in the format that was asked for, and loaded
from that: what a format or a model cannot hold is known in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fxfusion.checkpoints.canonical_save import CanonicalTensors
from fxfusion.checkpoints.empty_model import fuse_on_meta, outline, own_tensors
from fxfusion.checkpoints.llama_cpp.export import GgufExport
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.checkpoints.nemotron_nas.load import config_from
from fxfusion.checkpoints.nemotron_nas.proof import empty_decoder
from fxfusion.checkpoints.per_layer.any_model import AnyModelPlan
from fxfusion.checkpoints.per_layer.export import ExportPlan
from fxfusion.checkpoints.reading import SafeFolder
from fxfusion.checkpoints.shards import TensorFacts
from fxfusion.cli import inputs
from fxfusion.cli.options import Format
from fxfusion.errors import CheckpointError, OptionError, PlanError, SurgeryError
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.roads import plan_of, window

_TRIES = 3  # windows of a road; where none of them can be had, the planner says why


def rehearse(folder: Path, format: Format, roads: Iterable[str], mixers: list[int], layers: int) -> dict[str, int]:
    """By road, the bytes of the model that would be written. Raises `OptionError` that names the road and what its
    windows cannot be written as, before anything is measured."""
    roads = tuple(roads)
    found = {}
    for road in roads:
        for first in range(min(_TRIES, layers - 1)):
            segment = window(roads, road, first, first + 1, mixers) or window(roads, road, first, first, mixers)
            if segment is None:
                continue
            plan = plan_of([segment], mixers)
            try:
                model = fuse(inputs.build_without_weights(folder, changed=False), plan)
            except (SurgeryError, PlanError):
                continue
            try:
                found[road] = _written(folder, format, model, plan)
            except CheckpointError as error:
                raise OptionError(
                    f"--format {format.value}: what --roads {road} makes cannot be written so: {error}"
                ) from error
            break
    return found


def _written(folder: Path, format: Format, model: Any, plan: FusionPlan) -> int:
    """The bytes of what would be written. Raises `CheckpointError` where it could not be, or not be read again."""
    if format is Format.nemotron_nas:
        exported = plan_export(model)
        where = SafeFolder.of(folder if folder.is_dir() else folder.parent)
        loaded = empty_decoder(config_from(exported.config, where))
        named = dict(loaded.named_parameters())
        _compare(exported.tensors, (TensorFacts.of(name, value) for name, value in named.items()))
        return exported.nbytes
    if format is Format.transformers:
        return ExportPlan.of(model).nbytes
    if format is Format.anymodel:
        return AnyModelPlan.of(model).nbytes
    if format is Format.gguf:
        return GgufExport.of(model).nbytes
    tensors = CanonicalTensors.of(model)
    read = outline(tensors.config, model.dtype)
    _compare(tensors.facts, (TensorFacts.of(name, value) for name, value in own_tensors(read).items()))
    if not plan.removed:  # then the folder holds a plain model
        fuse_on_meta(read, plan, 1)
    return sum(one.nbytes for one in tensors.facts)


def _compare(written: Iterable[TensorFacts], read: Iterable[TensorFacts]) -> None:
    """Raises `CheckpointError` that names the first tensor that would not be read as it is written."""
    known = {one.name: one.shape for one in written}
    for one in read:
        if one.shape != torch.Size(known.get(one.name, ())):
            raise CheckpointError(f"{one.name} would be read as {list(one.shape)}, written {known.get(one.name)}")
