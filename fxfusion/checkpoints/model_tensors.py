"""Which tensors of a model a checkpoint holds: parameters and persistent buffers, tied ones once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.checkpoints.shards import TensorFacts
from fxfusion.errors import CheckpointError
from fxfusion.models.adapters.wrappers import find_wrappers

_OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # stored by old versions of transformers, computed by new ones


def tied_names(model: Any) -> dict[str, str]:
    """Names that stand for another tensor as the config says, with the name of that: `lm_head.weight` as a rule."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def check_plain(model: Any) -> None:
    """Raises `CheckpointError` that names what no format holds: adapters, quantised or sharded weights."""
    wrapper = next(iter(find_wrappers(model)), None)
    if wrapper is not None:
        raise CheckpointError(
            f"{wrapper.path} has adapters, which are no part of the model: merge them first (`merge_and_unload`); PEFT "
            "saves them alone"
        )
    for name, value in model.state_dict(keep_vars=True).items():
        if type(value.detach()) is not Tensor:
            raise CheckpointError(
                f"{name} is a {type(value.detach()).__name__}, and only plain tensors are written: fuse and save the "
                "model first, then quantise or shard what from_pretrained loads"
            )
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None:
        raise CheckpointError(
            "the model is quantised (config.quantization_config), and only plain tensors are written: fuse and save it "
            "first, then quantise what from_pretrained loads"
        )


def own_tensors(model: Any) -> dict[str, Tensor]:
    """All others, by name, in the model's order."""
    tied = tied_names(model)
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}


def stored_names(model: Any, reader: CheckpointReader) -> dict[str, str]:
    """For each tensor that the model expects, the name by which the folder has it.

    Checkpoints of the bare decoder lack the first part of every name, and of two tied tensors either may be there.
    Raises `CheckpointError` where something is missing, left over, or of another shape or kind.
    """
    tied = tied_names(model)
    own = own_tensors(model)
    stored = reader.stored
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name in own:
        same = [name, *(target for target, source in tied.items() if source == name)]
        choices = [*same, *(one.removeprefix(prefix) for one in same)]
        found[name] = next((choice for choice in choices if choice in stored), name)
    reader.check(
        (TensorFacts(found[name], tuple(value.shape), value.dtype) for name, value in own.items()),
        optional=[*tied, *_ignored(model, stored)],
    )
    for target, source in tied.items():
        if target in stored and found[source] != target and not reader.read(target).equal(reader.read(found[source])):
            raise CheckpointError(
                f"{reader.folder.path}: the config says that {target} is {source}, and the files have two tensors that "
                "differ; set tie_word_embeddings to false in config.json"
            )
    return found


def _ignored(model: Any, stored: Mapping[str, TensorFacts]) -> Iterable[str]:
    """Names that transformers leaves out of such models without a word."""
    patterns = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return [name for name in stored if any(one.search(name) for one in (*patterns, _OLD_BUFFERS))]
