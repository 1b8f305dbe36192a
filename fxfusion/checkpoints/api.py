"""`save_pretrained` and `from_pretrained`: models in the formats that fxfusion knows.

canonical      original names and shapes, plan beside them: plain transformers loads the unfused model
nemotron-nas   fused layers as they are: engines for DeciLM models load the fused model
transformers   fused layers of the family's own classes: transformers loads the fused model
anymodel       the family's own tensors and `block_configs`, as Model-Optimizer reads and writes them
gguf           the same as one file, for llama.cpp and what is built on it
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fxfusion.checkpoints import canonical_load, canonical_save
from fxfusion.checkpoints.companions import Card, Companions, card_text, gguf_about
from fxfusion.checkpoints.folder import check_replaceable
from fxfusion.checkpoints.gguf import load as gguf_load
from fxfusion.checkpoints.gguf.header import is_gguf
from fxfusion.checkpoints.llama_cpp import export as gguf_export
from fxfusion.checkpoints.nemotron_nas import export as nemotron_export
from fxfusion.checkpoints.nemotron_nas import load as nemotron_load
from fxfusion.checkpoints.nemotron_nas.members import load_unfused
from fxfusion.checkpoints.per_layer import any_model
from fxfusion.checkpoints.per_layer import export as per_layer_export
from fxfusion.checkpoints.quantised import grid_of
from fxfusion.checkpoints.reading import SafeFolder
from fxfusion.checkpoints.shards import DEFAULT_SHARD_SIZE
from fxfusion.compiler.unwrap import offloaded
from fxfusion.errors import CheckpointError, OptionError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.models.weight_grid import WeightGrid
from fxfusion.plan.fusion_plan import FusionPlan

FORMATS = ("canonical", "nemotron-nas", "transformers", "anymodel", "gguf")
Format = Literal["canonical", "nemotron-nas", "transformers", "anymodel", "gguf"]
Quantize = Literal["int8", "int4"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: Format = "canonical",
    *,
    plan: Any = None,
    tokenizer: Any = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    gguf_type: GgufType | None = None,
    quantize: Quantize | None = None,
    group_size: int | None = None,
    card: Card | Mapping[str, Any] | None = None,
    progress: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model folder or file: all of it, or nothing. Without `plan`, the model is not changed.

    Args:
        model: a causal language model of `transformers`: intact, without some attention, or fused, on any device.
        directory: a new or empty folder, or one that fxfusion wrote and nobody changed since, which is replaced; of
            format `"gguf"` such a file.
        format: `"canonical"` keeps the original tensors and puts the plan beside them; `"nemotron-nas"` writes the
            fused layers for engines that know DeciLM models, which only Llama-like models are; `"transformers"` writes
            them as `per_layer_config` and one file of the family's own classes, for transformers and vLLM;
            `"anymodel"` as `block_configs`, for Model-Optimizer (Puzzletron); `"gguf"` as one file for llama.cpp, wide
            attention too, of Llama-like models.
        plan: fuse the model by it, in place, as `fuse` does. A canonical folder then has the members' weights bit for
            bit, as no fused model can give them back where gains were folded.
        tokenizer: one of `transformers`. Without it, that of the folder or name that the model was loaded from; if
            there is none, a warning says so.
        max_shard_size: bytes of a file at most, or text such as `"500MB"`.
        gguf_type: of the matrices of a GGUF file: `"f32"`, `"f16"`, `"bf16"`, `"q8_0"` or `"q4_0"`; None: the model's
            dtype. Norms stay float32; with q4_0 embedding and head are q8_0.
        quantize: `"int8"` or `"int4"`: of formats nemotron-nas and transformers, the linear layers of the decoder's
            layers as integers, by torchao, weight-only; transformers loads them, fxfusion does not. A byte for a weight
            of 4 bits, too; GGUF packs them. What `refit(grid=...)` put on the same grid stays as it is.
        group_size: inputs that share a scale, 32 by default; it must divide those of every such layer.
        card: what README.md should say beside base model, licence and plan: fields of `Card`, such as
            `{"quality": {"perplexity": 21.4}, "engines": ["vLLM 0.32"]}`.
        progress: say how far it is, on the error stream.
        overwrite: replace a folder by others, with all that is in it.

    Raises:
        PlanError: the plan is for another model, or names what cannot be one group.
        CheckpointError: the format cannot express the model, or the folder cannot be written; it names the tensor,
            setting or file. What was in the folder before is as it was.
        SurgeryError: the model was fused in another process, so its members are not known; or the plan cannot be
            applied to it.
        OptionError: no such format or type, a format that is not quantised so, or a layer whose inputs are no whole
            groups.
    """
    grid = _read_options(format, gguf_type, quantize, group_size)
    check = gguf_export.check_target if format == "gguf" else check_replaceable
    check(directory, overwrite=overwrite)
    chosen = None if plan is None else FusionPlan.resolve(plan)
    bare = bare_model(model)
    more: dict[str, Any] = {"progress": progress, "overwrite": overwrite}
    if format == "gguf":
        _fuse_whole(model, chosen)
        about = gguf_about(bare, chosen or plan_of(bare), card)
        gguf_export.save(bare, directory, type=gguf_type, tokenizer=tokenizer, about=about, **more)
        return
    companions = Companions.of(bare, tokenizer)
    text = partial(card_text, bare, chosen or plan_of(bare), format, _with_note(card, grid))
    more |= {"tokenizer": companions, "card": text, "max_shard_size": max_shard_size}
    if format == "canonical":
        canonical_save.save(bare, Path(directory), plan=chosen, **more)
        return
    _fuse_whole(model, chosen)
    if format == "anymodel":
        any_model.save(model, Path(directory), **more)
    else:
        exporter = per_layer_export if format == "transformers" else nemotron_export
        exporter.save(model, Path(directory), grid=grid, **more)


def _read_options(
    format: str, gguf_type: str | None, quantize: str | None, group_size: int | None
) -> WeightGrid | None:
    if format not in FORMATS:
        raise OptionError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if gguf_type is not None and format != "gguf":
        raise OptionError(f"gguf_type is of format gguf, not of {format}")
    return grid_of(quantize, group_size, format)


def _fuse_whole(model: nn.Module, plan: FusionPlan | None) -> None:
    if words := offloaded(bare_model(model)):
        raise CheckpointError(f"the model cannot be written: {words}; load it whole")
    if plan is not None:
        fuse(model, plan)


def _with_note(card: Card | Mapping[str, Any] | None, grid: WeightGrid | None) -> Card:
    own = Card.of(card)
    if grid is None:
        return own
    words = f"The linear layers of its layers are {grid.bits}-bit integers, in groups of {grid.group}, by torchao: "
    words += "`transformers` loads them with that package installed."
    return replace(own, notes=f"{own.notes}\n\n{words}".strip())


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    fused: bool = True,
    shards: int = 1,
    progress: bool = False,
) -> Any:
    """Load a model: a canonical folder with its plan applied, a plain one of `transformers`, a GGUF file, or a folder
    whose config lists its layers (nemotron-nas, anymodel, `per_layer_config`), ours or not.

    The folder need not be trusted: no pickle is read and no code of it is run; names, shapes and sizes are checked
    before memory is taken for them. Peak memory is the model and the widest group; where transformers stores a model
    in another form than its modules have (experts one by one, say), it is what its own `from_pretrained` takes.

    Args:
        directory: the folder, or the GGUF file: of an architecture and quantisation that transformers reads (package
            `gguf`: `pip install "fxfusion[real]"`), whole, and with nothing in it that would be left aside.
        dtype: what floating-point tensors are cast to, such as `torch.bfloat16` or `"bfloat16"`; None and `"auto"` keep
            them as they are stored. Tensors that transformers converts are read in one dtype, and a warning says where
            that rounds. Quantised ones of a GGUF file are dequantised, to float32 without `dtype`.
        device: where the model goes.
        fused: apply the plan's groups; without, only the attention that it drops is dropped. A nemotron-nas folder
            that fxfusion wrote gives the model from before it was fused, of its own class: weights bit for bit with
            `norm="last"`, to rounding with `"fold"`; others keep no members.
        shards: see `fuse`: for tensor parallelism over so many devices.
        progress: say how far it is, on the error stream.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: a file or tensor that is missing, cut off, left over, or not what the model expects, by name.
        PlanError: a plan that cannot be read, or is for another model.
        SurgeryError: the plan cannot be applied to this model.
        OptionError: no such dtype.
    """
    dtype = _read_dtype(dtype)
    if is_gguf(directory):
        return gguf_load.load(directory, dtype=dtype, device=device)
    folder = SafeFolder.of(directory)
    kind = folder.json(canonical_load.CONFIG).get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder.path / canonical_load.CONFIG} has no model_type")
    if kind != nemotron_load.MODEL_TYPE:
        return canonical_load.load(directory, dtype=dtype, device=device, fused=fused, shards=shards, progress=progress)
    if not fused:
        return load_unfused(directory, dtype=dtype, device=device, progress=progress)
    if shards != 1:
        raise CheckpointError(
            f"{folder.path} has its channels in one order: fuse with shards={shards} before exporting"
        )
    return nemotron_load.load(directory, dtype=dtype, device=device, progress=progress)


def _read_dtype(given: Any) -> torch.dtype | None:
    """None: as stored. Raises `OptionError` for what is no floating-point dtype."""
    if given is None or given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype: expected a floating-point torch.dtype, its name, 'auto' or None, got {given!r}")
    return found
