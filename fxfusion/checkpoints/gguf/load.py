"""A GGUF file as a model: what llama.cpp and its kin run, read by transformers into a plain model of floats.

    header -> config without quantisation -> tensors, dequantised -> a model that can be fused, measured and saved

Which tensor of a file is which of a model's is known to transformers and to the package `gguf`. What they leave aside
silently is an error here: a tensor that no place of the model takes, a setting that its config does not repeat.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fxfusion.checkpoints.empty_model import check_buffers, config_of, empty_model, outline, own_tensors
from fxfusion.checkpoints.gguf.header import SUFFIX, GgufFile, require
from fxfusion.checkpoints.gguf.settings import check_settings
from fxfusion.checkpoints.reading import silent
from fxfusion.errors import CheckpointError, first_line
from fxfusion.models.ffn_surgery.widen import set_parameter

_ALONE = f"model{SUFFIX}"  # its name while transformers reads it
_DIGITS = 6  # that a float32 always keeps
_OWN_FOLDER = "give the folder of the model that the file was made from"
_IDS = "give token ids (.safetensors) instead of text"
_RULES_OF_GPT2 = ("default", "gpt-2", "gpt2")


def config_dict(file: GgufFile) -> dict[str, Any]:
    """The content of a `config.json` of the model, without quantisation. Raises `CheckpointError`."""
    facts = os.stat(file.path)
    return copy.deepcopy(_config_dict(file.path, facts.st_size, facts.st_mtime_ns))


@lru_cache(maxsize=4)
def _config_dict(path: Path, size: int, written: int) -> dict[str, Any]:
    """It takes seconds where a vocabulary is large, so it is read once while the file stays as it is."""
    from transformers import AutoConfig

    file = GgufFile.read(path)
    with _alone(path) as folder, _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=_ALONE, local_files_only=True)
            found = json.loads(config.to_json_string(use_diff=False))
        except Exception as error:  # whatever the library makes of it
            raise _unreadable(file, error) from error
    for name in ("quantization_config", "transformers_version", "dtype"):
        found.pop(name, None)
    plain: dict[str, Any] = _decimal(found)
    return plain


def read_config(file: GgufFile) -> Any:
    """The config of the model, checked against the header. Raises `CheckpointError`."""
    data = config_dict(file)
    try:
        config = config_of(data, file.path)
    except CheckpointError as error:
        raise _unreadable(file, error) from error
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(file.tensors):  # building modules takes time and memory
        raise CheckpointError(
            f"{file.path} asks for {layers} layers, and has {len(file.tensors)} tensors; fetch it anew"
        )
    check_settings(file.path, file.architecture, file.metadata, config)
    return config


def load(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """The model of a file, in eval mode: plain floats, with a config that knows nothing of a quantisation.

    Args:
        dtype: None: float32 where weights are quantised, else as most of them are stored.

    Raises:
        CheckpointError: as of `GgufFile.read`; an architecture, setting or tensor that transformers does not read.
    """
    file = GgufFile.read(path)
    require("accelerate")  # transformers wants it here
    built = dtype or getattr(torch, file.dtype)
    config = read_config(file)
    intact = outline(config, built)
    check_buffers(intact)
    _check_tensors(file, intact)
    found = own_tensors(_read(file, intact, config, built))
    model = empty_model(config, built)
    for name, wanted in own_tensors(model).items():
        value = found[name].detach()
        if type(value) is not torch.Tensor or value.shape != wanted.shape:
            raise CheckpointError(f"{file.path}: {name} is {list(value.shape)}, the model's is {list(wanted.shape)}")
        set_parameter(model, name, value.to(device=device, dtype=wanted.dtype))
    model.tie_weights()
    model.config.dtype = built
    model.name_or_path = model.config._name_or_path = os.fspath(path)
    return model.to(device).eval()


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer in a file. Raises `CheckpointError` where there is none, or none that transformers reads.

    A warning says so where transformers has no rule of that name for cutting text.
    """
    from transformers import AutoTokenizer

    file = GgufFile.read(path)
    read_config(file)  # which says what else is wrong
    if not file.metadata.get("tokenizer.ggml.tokens"):
        raise CheckpointError(f"{file.path} has no tokenizer in it (tokenizer.ggml.tokens); {_IDS}")
    with _alone(file.path) as folder, _quiet():
        try:
            found = AutoTokenizer.from_pretrained(folder, gguf_file=_ALONE, local_files_only=True)
        except Exception as error:  # each kind of tokenizer fails in its own way
            kind = file.metadata.get("tokenizer.ggml.model")
            raise CheckpointError(
                f"{file.path}: its tokenizer ({kind}) cannot be read: {first_line(error)}; {_IDS}"
            ) from error
    for name in ("vocab_file", "gguf_file"):
        found.init_kwargs.pop(name, None)
    found.name_or_path = found.init_kwargs["name_or_path"] = os.fspath(path)
    rule = file.metadata.get("tokenizer.ggml.pre")
    cut = str(getattr(getattr(found, "backend_tokenizer", None), "pre_tokenizer", ""))
    if rule not in (None, *_RULES_OF_GPT2) and cut.startswith("ByteLevel") and "use_regex=True" in cut:
        warnings.warn(
            f"{file.path}: transformers has no rule {rule!r} (tokenizer.ggml.pre) for cutting text, and takes that of "
            "GPT-2: some tokens may differ",
            stacklevel=2,
        )
    return found


# --- what transformers reads --------------------------------------------------------------------------


def _read(file: GgufFile, intact: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model as transformers makes it, which still says that it is quantised."""
    import transformers

    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # else it always dequantises
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _alone(file.path) as folder, _quiet():
        try:
            found, info = type(intact).from_pretrained(
                folder,
                gguf_file=_ALONE,
                config=copy.deepcopy(config),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                **more,
            )
        except Exception as error:  # whatever the library makes of it
            raise CheckpointError(f"{file.path}: transformers cannot load its tensors: {first_line(error)}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise CheckpointError(f"{file.path} lacks the tensor {absent[0]} of the model")
    return found


def _check_tensors(file: GgufFile, intact: Any) -> None:
    """Raises where file and model have not the same number of values: what is left over would be left out silently."""
    wanted = own_tensors(intact)
    there = sum(math.prod(tensor.shape) for tensor in file.tensors)
    needed = sum(value.numel() for value in wanted.values())
    if there == needed:
        return
    names = _names(file, intact)
    left = [tensor.name for tensor in file.tensors if tensor.name not in names]
    known = {tensor.name for tensor in file.tensors}
    absent = [name for name in names if name not in known]
    what = "; ".join(
        f"{words} {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}"
        for words, found in (("it lacks", absent), ("the model has no place for", left))
        if found
    )
    raise CheckpointError(
        f"{file.path} has {there} values, and its model ({intact.config.model_type}) as transformers builds it {needed}"
        f"{what and ': '}{what}; {_OWN_FOLDER}"
    )


def _names(file: GgufFile, intact: Any) -> list[str]:
    """The names that a file of such a model has, as far as the package `gguf` knows them."""
    import gguf

    which = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if which is None:
        return []
    layers = intact.config.get_text_config(decoder=True).num_hidden_layers
    known = gguf.get_tensor_name_map(which, layers)
    found = (known.get_name(name, try_suffixes=(".weight", ".bias")) for name in own_tensors(intact))
    return [name for name in found if name is not None]


def _unreadable(file: GgufFile, error: Exception) -> CheckpointError:
    import transformers

    runs = "llama.cpp runs it as it is; else " if file.architecture == "deci" else ""
    return CheckpointError(
        f"{file.path}: transformers {transformers.__version__} does not read the architecture {file.architecture!r} "
        f"from GGUF files ({first_line(error)}); {runs}{_OWN_FOLDER}"
    )


def _decimal(value: Any) -> Any:
    """Numbers that were written as float32, as the decimal that they were made of: 9.999999747378752e-06 -> 1e-05."""
    import numpy as np

    if isinstance(value, dict):
        return {name: _decimal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decimal(item) for item in value]
    if not isinstance(value, float) or not math.isfinite(value) or float(np.float32(value)) != value:
        return value
    short = float(f"{value:.{_DIGITS}g}")
    return short if float(np.float32(short)) == value else value


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[str]:
    """A folder with a link to the file and nothing else: what lies beside it (adapters, a tokenizer) is not read."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(path.resolve(), Path(folder, _ALONE))
        yield folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says on the way, and without its bar, which no setting of its own takes away."""
    with silent(), contextlib.redirect_stderr(io.StringIO()):
        yield
