"""Load a canonical folder: the model as transformers names it, with the plan applied while its tensors are read.

    config.json, plan -> names and shapes compared with the files -> attention out, FFNs fused, all on the meta device
    -> the tensors, streamed; those of dropped attention are never read

Without a plan it is the plain model.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from fxfusion.checkpoints.converted import changed_own, changes_stored, load_converted
from fxfusion.checkpoints.empty_model import all_on_meta, config_of, empty_model, outline, real_empties
from fxfusion.checkpoints.filling import Filling
from fxfusion.checkpoints.model_tensors import own_tensors, stored_names
from fxfusion.checkpoints.progress import byte_bar
from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder
from fxfusion.errors import CheckpointError, SurgeryError
from fxfusion.models.drop_record import write_refit
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.plan.fusion_plan import FusionPlan

CONFIG, GENERATION_CONFIG, PLAN = "config.json", "generation_config.json", "fxfusion_plan.yaml"

log = logging.getLogger("fxfusion")


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    fused: bool = True,
    shards: int = 1,
    progress: bool = False,
) -> Any:
    """The model of a canonical folder, in eval mode. Arguments and errors as of `fxfusion.from_pretrained`."""
    reader = CheckpointReader.open(directory)
    config = read_config(reader)
    generation = read_generation_config(reader.folder)
    plan = read_plan(reader.folder)
    if plan is not None and not fused:
        if plan.refit is not None and plan.groups:
            warnings.warn(f"{directory} was refitted for its fused form; without, it is another model", stacklevel=3)
        plan = plan.replace(groups=())
    built = dtype or main_dtype(reader)
    intact = outline(config, built)
    stored = _names(intact, reader)
    if stored is None:
        model, done = load_converted(reader, intact, copy.deepcopy(config), built), plan is None
    else:
        model = empty_model(copy.deepcopy(config), built)
        done = plan is None or fuse_on_meta(model, plan, shards)
        dtypes = {name: value.dtype for name, value in own_tensors(intact).items()} if dtype is not None else {}
        first = Filling(reader=reader, stored=stored, dtypes=dtypes, device=device if done else "cpu")
        with byte_bar(progress, "Reading", first.nbytes(model)) as advance:
            replace(first, advance=advance).run(model)
    if not done:
        fuse(model, plan, shards=shards)
    if plan is not None and plan.refit is not None:
        write_refit(model.config, plan.refit)
    model.config.dtype = built
    model.name_or_path = model.config._name_or_path = os.fspath(directory)
    if generation is not None:
        model.generation_config = generation
    return model.to(device).eval()


def _names(intact: Any, reader: CheckpointReader) -> dict[str, str] | None:
    """As of `stored_names`; None where transformers stores such a model in another form, and the folder has that."""
    try:
        found = stored_names(intact, reader)
    except CheckpointError:
        if not changes_stored(intact):
            raise
        return None
    changed = changed_own(intact)
    return None if changed is not None and changed[1] else found


def read_config(reader: CheckpointReader) -> Any:
    """The config of a folder, checked against the number of tensors: building modules takes time and memory."""
    where = reader.folder.path / CONFIG
    config = config_of(reader.folder.json(CONFIG), where)
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(reader.stored):
        raise CheckpointError(f"{where} asks for {layers} layers, and the files have {len(reader.stored)} tensors")
    return config


def read_plan(folder: SafeFolder) -> FusionPlan | None:
    """Raises `PlanError` that names file and line."""
    return FusionPlan.load(folder.file(PLAN)) if folder.has(PLAN) else None


def main_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype of most of what is stored."""
    sizes: Counter[torch.dtype] = Counter()
    for facts in reader.stored.values():
        if facts.dtype.is_floating_point:
            sizes[facts.dtype] += facts.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def read_generation_config(folder: SafeFolder) -> Any:
    """Settings of `generate`, None where the folder has none. Raises `CheckpointError`."""
    from transformers import GenerationConfig

    if not folder.has(GENERATION_CONFIG):
        return None
    settings = folder.json(GENERATION_CONFIG)
    try:
        return GenerationConfig.from_dict(settings)
    except Exception as error:  # whatever the class makes of bad values
        raise CheckpointError(f"{folder.path / GENERATION_CONFIG} is not valid: {error}") from error


def fuse_on_meta(model: Any, plan: FusionPlan, shards: int) -> bool:
    """Apply a plan to a model without weights. False, and nothing done, where its code does not run on the meta
    device; such a model is fused when it has its weights."""
    try:
        with all_on_meta(model):
            fuse(model, plan, shards=shards)
    except SurgeryError as error:
        log.info("the plan is applied after the weights are read, since it cannot be before: %s", error)
        return False
    state = fused_state(model)
    if state is not None:
        gone = (*state.shells.values(), *state.parts.values())
        real_empties(part for shell in gone for part in shell.modules())
    return True
