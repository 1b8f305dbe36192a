"""Read what transformers stores in another form than its modules have it: experts one by one, other names or layouts.

    config.json, headers -> is there a conversion, and are there values enough -> the class's own `from_pretrained`

Which families do so, and how, is known to transformers alone. Its loader holds the whole model, so a plan is applied
after it; no code of the folder is run, no pickle is read, and nothing is left at random values.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxfusion.checkpoints.empty_model import check_buffers
from fxfusion.checkpoints.model_tensors import own_tensors
from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.errors import CheckpointError

_ADAPTER = "adapter_config.json"


def changes_stored(model: Any) -> bool:
    """Whether transformers stores some tensors of such a model in another form than the model has them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def changed_own(model: Any) -> tuple[str, bool] | None:
    """A tensor that transformers would take for another one if a folder had it by the model's own name, and whether it
    would change its values, too; None where there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = get_model_conversion_mapping(model, add_legacy=False)
    converters = [one for one in known if isinstance(one, WeightConverter)]
    renamings: list[Any] = [one for one in known if not isinstance(one, WeightConverter)]
    for name in own_tensors(model) if known else ():
        renamed, pattern = rename_source_key(name, renamings, converters)
        if renamed != name or pattern is not None:
            return name, pattern is not None
    return None


def load_converted(reader: CheckpointReader, outline: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model of a folder, its tensors converted as its class does it, on the CPU.

    `outline`: the model on the meta device; `dtype`: of all floating-point tensors, but those that the class keeps in
    float32. Raises `CheckpointError` that names a tensor which is missing, left over or of another shape.
    """
    folder = reader.folder
    if folder.has(_ADAPTER):
        raise CheckpointError(f"{folder.path / _ADAPTER}: the folder holds adapters; load them with PEFT")
    _check_room(reader, outline)
    try:
        with _silent():
            model, found = type(outline).from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library and its conversions make of bad files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder.path}: transformers cannot load its tensors: {reason}") from error
    for what, words in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        if found[what]:
            first = min(one if isinstance(one, str) else one[0] for one in found[what])
            raise CheckpointError(f"{folder.path} {words} the tensor {first}, by the conversions of transformers")
    if found["unexpected_keys"]:
        raise CheckpointError(f"{folder.path}: {min(found['unexpected_keys'])} is no tensor of the model")
    _say_casts(reader, model, dtype)
    return model


def _check_room(reader: CheckpointReader, outline: nn.Module) -> None:
    """Conversions move values and make none: a config that asks for more is wrong, before memory is taken for it."""
    check_buffers(outline)
    wanted = sum(value.numel() for value in own_tensors(outline).values())
    stored = sum(math.prod(facts.shape) for facts in reader.stored.values())
    if wanted > stored:
        raise CheckpointError(f"{reader.folder.path}: the config asks for {wanted} values, and the files have {stored}")


def _say_casts(reader: CheckpointReader, model: nn.Module, dtype: torch.dtype) -> None:
    """Say that values lost precision on the way: which tensors became which is the library's own affair."""
    wider = [facts for facts in reader.stored.values() if facts.dtype.is_floating_point]
    wider = [facts for facts in wider if facts.dtype.itemsize > dtype.itemsize]
    kept = {value.dtype for value in model.parameters()}
    if wider and not any(facts.dtype in kept for facts in wider):
        warnings.warn(f"{wider[0]} is read as {dtype}, as most of {reader.folder.path} is", stacklevel=4)


@contextmanager
def _silent() -> Iterator[None]:
    """Without bars and reports of transformers: what is wrong is an error here."""
    from transformers.utils import logging as transformers_logging

    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
