"""Proof of a folder for transformers: loaded as transformers loads it, it is the model in memory.

Every module of the layers is of the same class with the same plain settings (a sliding window shows in no short text),
and the logits of a few tokens are the same, at once and one after the other with a cache.
"""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfusion.checkpoints.per_layer.stack import Stack
from fxfusion.checkpoints.reading import silent
from fxfusion.errors import CheckpointError, SurgeryError, first_line
from fxfusion.models.cache_slots import is_index
from fxfusion.models.surgery_proof import cached_logits, full_logits, proof_tokens, relative

_ALLOWED = 16  # times the dtype's epsilon: the same operations, so mostly no difference at all
_CANNOT = "the transformers format cannot say this model"
_PLAIN = (bool, int, float, str, type(None))


def prove(model: Any, stack: Stack, folder: Path, code: str, name: str) -> None:
    """Raises `CheckpointError` unless a folder holds the model. `code`: its modeling file; `name`: the class in it."""
    with loaded_code(folder / f"{code}.py") as module:
        twin = _load(getattr(module, name), model, folder)
        _check_modules(model, twin, stack)
        check_logits(model, twin)


@contextmanager
def loaded_code(file: Path) -> Iterator[Any]:
    """A file of ours as a module, without a place in transformers' cache of code."""
    name = f"fxfusion_written_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.dont_write_bytecode = before
        sys.modules.pop(name, None)


def _load(kind: Any, model: Any, folder: Path) -> Any:
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    try:
        with silent():
            twin, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except Exception as error:  # whatever the family's classes make of the settings
        raise CheckpointError(f"{_CANNOT}: {first_line(error)}") from error
    wrong = sorted(str(name) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[what])
    if wrong:
        raise CheckpointError(f"{_CANNOT}: {wrong[0]} is not found where it belongs")
    return twin.to(model.device).eval()


def _check_modules(model: nn.Module, twin: nn.Module, stack: Stack) -> None:
    for block in stack.blocks:
        place = stack.place(block.number)
        for name, module in block.module.named_modules(prefix=f"{stack.path}.{block.number}"):
            path = name.removeprefix(f"{stack.path}.{block.number}").removeprefix(".")
            other = twin.get_submodule(f"{stack.path}.{place}.{path}".rstrip("."))
            if path in block.skip or (not path and not block.has_attention):
                continue
            own, theirs = _settings(module), _settings(other)
            for setting in own.keys() | theirs.keys():
                if own.get(setting) != theirs.get(setting):
                    raise CheckpointError(
                        f"{_CANNOT}: {name}.{setting} is {own.get(setting)!r}, and "
                        f"{theirs.get(setting)!r} as the config builds it"
                    )
            if path and type(module) is not type(other):
                kinds = f"{type(module).__name__}, not {type(other).__name__}"
                raise CheckpointError(f"{_CANNOT}: {name} is a {kinds}")


def _settings(module: nn.Module) -> dict[str, Any]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_") and name != "training" and not is_index(name, value)
    }


def check_logits(model: Any, twin: Any, form: str = "the transformers format") -> None:
    """Raises `CheckpointError` unless a model that was read again computes the same, at once and with a cache."""
    cannot = f"{form} cannot say this model"
    ids = proof_tokens(model)
    limit = _ALLOWED * max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps)  # norms are in float32
    try:
        pairs = {"": (full_logits(twin, ids), full_logits(model, ids))}
        wanted = cached_logits(model, ids)
        if wanted is not None:
            found = cached_logits(twin, ids)
            pairs[" with a cache"] = (wanted if found is None else found, wanted)
    except SurgeryError as error:
        raise CheckpointError(f"what is written cannot be compared with the model: {error}") from error
    except Exception as error:  # a block behind a layer that asks for more than it is given, say
        raise CheckpointError(f"{cannot}: {first_line(error)}") from error
    for how, (found, expected) in pairs.items():
        off = relative(found, expected)
        if not off <= limit:
            raise CheckpointError(
                f"{cannot}: tensors and settings fit, but the logits{how} are off by {off:.2g} (allowed {limit:.2g})"
            )
