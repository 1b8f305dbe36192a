"""Read a checkpoint folder that nobody vouches for: everything is checked before memory is taken for it.

    folder -> index and headers (names, shapes, dtypes, sizes) -> compared with what the model expects -> values

Only safetensors files are read, never a pickle and never code. Files lie in the folder itself; a link may only lead
to a place inside it, or to the `blobs` of the hub's cache that the folder is a snapshot in. Which tensor of a folder is
which of a model's is known to transformers, which also converts some (experts one by one, other names or layouts):
`read_model` gives it the tensors, one after the other, and nothing is left at random values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfusion.checkpoints.empty_model import changes_stored, check_buffers, own_tensors, tied_names
from fxfusion.checkpoints.folder import existing
from fxfusion.checkpoints.shards import INDEX, SINGLE, TensorFacts, stored_dtypes
from fxfusion.errors import CheckpointError, first_line
from fxfusion.models.ffn_surgery.widen import set_parameter
from fxfusion.report.progress import reporting

_MAX_CONFIG, _MAX_INDEX = 2**22, 2**26  # bytes; the largest known ones have a tenth of that
SUBBLOCKS = "subblocks_safetensors"
"""A folder inside, where Model-Optimizer puts a model's tensors."""

_ADAPTER = "adapter_config.json"
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_CASTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class SafeFolder:
    """A folder whose files are read by plain names. `roots`: where their content may lie, links resolved."""

    path: Path
    roots: tuple[Path, ...]

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> SafeFolder:
        """Raises `CheckpointError` where there is no folder."""
        path = existing(directory)
        root = Path(os.path.realpath(path))
        blobs = root.parent.parent / "blobs"
        is_snapshot = root.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
        return cls(path, (root, blobs) if is_snapshot else (root,))

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path:
        """The path of a file. Raises `CheckpointError` where it is missing, no file, or outside the folder."""
        inner = name.removeprefix(f"{SUBBLOCKS}/")
        if inner != os.path.basename(inner) or inner in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{self.path} names the file {name!r}, which is not one in the folder")
        path = self.path / name
        if not os.path.lexists(path):
            raise CheckpointError(f"{path} is missing: the folder is no checkpoint, or was not written to its end")
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self.roots):
            raise CheckpointError(f"{path} is a link that leads out of the folder, to {real}")
        try:
            is_file = stat.S_ISREG(os.stat(real).st_mode)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if not is_file:
            raise CheckpointError(f"{path} is no file")
        return real

    def json(self, name: str, limit: int = _MAX_CONFIG) -> dict[str, Any]:
        """The object in a JSON file of at most `limit` bytes. Raises `CheckpointError`."""
        path = self.file(name)
        try:
            with open(path, "rb") as file:
                content = file.read(limit + 1)
            if len(content) > limit:
                raise CheckpointError(f"{self.path / name} is larger than {limit} bytes: not read")
            found = json.loads(content)
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path / name} cannot be read as JSON: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / name} holds a {type(found).__name__}, not an object")
        return found


@dataclass(frozen=True, slots=True)
class CheckpointReader:
    """The tensors of a folder. `stored`: what the headers say of each, by name; `files`: where it lies."""

    folder: SafeFolder
    stored: Mapping[str, TensorFacts]
    files: Mapping[str, str]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> CheckpointReader:
        """Read index and headers, and no value.

        Raises `CheckpointError` that names file and tensor: nothing but pickles, a file that is missing, truncated,
        outside the folder or no safetensors file, a tensor that is not where the index says or that is there twice.
        """
        folder = SafeFolder.of(directory)
        placed = _placed(folder)
        stored: dict[str, TensorFacts] = {}
        files: dict[str, str] = {}
        for file in placed or [SINGLE]:
            for facts in _header(folder, file):
                if facts.name in files:
                    raise CheckpointError(f"{facts.name} is both in {files[facts.name]} and in {folder.path / file}")
                stored[facts.name], files[facts.name] = facts, file
        for file, names in placed.items():
            lost = next((name for name in names if files.get(name) != file), None)
            if lost is not None:
                raise CheckpointError(f"{folder.path / file} lacks {lost}, which {INDEX} says is there")
        return cls(folder, stored, files)

    @classmethod
    def of_file(cls, folder: SafeFolder, name: str) -> CheckpointReader:
        """The tensors of one file, which need not be a part of the model."""
        stored = {facts.name: facts for facts in _header(folder, name)}
        return cls(folder, stored, dict.fromkeys(stored, name))

    def check(self, expected: Iterable[TensorFacts], optional: Iterable[str] = ()) -> None:
        """Compare with what the model expects; `optional`: names that may be there too.

        A floating-point tensor may have another precision. Raises `CheckpointError` that names the tensor.
        """
        wanted = {facts.name: facts for facts in expected}
        unexpected = self.stored.keys() - wanted.keys() - set(optional)
        for name, facts in wanted.items():
            found = self.stored.get(name)
            if found is None:
                hint = f"; it has {min(unexpected)}, which the model lacks" if unexpected else ""
                raise CheckpointError(f"{self.folder.path} lacks the tensor {name}{hint}")
            self.check_one(name, facts)
        if unexpected:
            raise CheckpointError(f"{self._place(min(unexpected))} is no tensor of the model")

    def check_one(self, name: str, expected: TensorFacts) -> None:
        """Raises `CheckpointError` where a tensor has another shape, or is of another kind."""
        found = self.stored[name]
        if found.shape != expected.shape:
            raise CheckpointError(f"{self._place(name)} is {list(found.shape)}, the model's is {list(expected.shape)}")
        if found.dtype != expected.dtype and not {found.dtype, expected.dtype} <= _CASTABLE:
            raise CheckpointError(f"{self._place(name)} is {found.dtype}, the model's is {expected.dtype}")

    def main_dtype(self) -> torch.dtype:
        """The dtype of most of what is stored."""
        sizes: Counter[torch.dtype] = Counter()
        for facts in self.stored.values():
            if facts.dtype.is_floating_point:
                sizes[facts.dtype] += facts.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def read(self, name: str) -> Tensor:
        """The values of one tensor, on the CPU, in memory of their own."""
        path = self.folder.file(self.files[name])
        with _naming(self._place(name)), _opened(path) as file:
            found: Tensor = file.get_tensor(name)
        if TensorFacts.of(name, found) != self.stored[name]:
            raise CheckpointError(f"{self._place(name)} changed while it was read")
        return found

    def _place(self, name: str) -> str:
        return f"{self.folder.path / self.files[name]}: {name}"


def read_model(
    reader: CheckpointReader,
    outline: Any,
    config: Any,
    dtype: torch.dtype,
    *,
    as_stored: bool = False,
    progress: bool = False,
) -> Any:
    """The model of a folder as transformers reads it, in eval mode on the CPU.

    Args:
        outline: the model on the meta device.
        config: its config, which becomes the new model's.
        dtype: of all floating-point tensors, but those that the class keeps in float32.
        as_stored: give those that need no conversion the dtype that they are stored in, and warn where another is
            rounded.

    Raises:
        CheckpointError: that names a tensor which is missing, left over, or of another shape or kind.
    """
    folder = reader.folder
    if folder.has(_ADAPTER):
        raise CheckpointError(f"{folder.path / _ADAPTER}: the folder holds adapters; load them with PEFT")
    _check_before(reader, outline)
    try:
        with (
            silent(),
            reporting(progress, "Reading", sum(one.nbytes for one in reader.stored.values()), is_bytes=True) as advance,
        ):
            model, found = type(outline).from_pretrained(
                None,
                config=config,
                dtype=dtype,
                state_dict={name: _Stored(reader, name, advance) for name in reader.stored},
                ignore_mismatched_sizes=True,  # which are errors here
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library and its conversions make of bad files
        raise CheckpointError(f"{folder.path}: transformers cannot load its tensors: {first_line(error)}") from error
    _check_after(reader, outline, model, found)
    if as_stored:
        kept = _keep_dtypes(reader, model)
        wider = [one for name, one in reader.stored.items() if one.dtype.is_floating_point and name not in kept]
        lost = next((one for one in wider if one.dtype.itemsize > dtype.itemsize), None)
        if lost is not None:
            warnings.warn(f"{lost} is read as {dtype}, as most of {folder.path} is", stacklevel=3)
    return model


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a folder, read when transformers asks for its values."""

    reader: CheckpointReader
    name: str
    advance: Callable[[int], None]

    def __getitem__(self, part: Any) -> Tensor:
        self.advance(self.reader.stored[self.name].nbytes)
        return self.reader.read(self.name)[part]

    def get_shape(self) -> list[int]:
        return list(self.reader.stored[self.name].shape)


def _same_names(reader: CheckpointReader, model: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Tensors that folder and model have by one name: that in the folder (of the bare decoder, without its first part),
    the model's, and the model's tensor."""
    prefix = f"{model.base_model_prefix}."
    for name, value in own_tensors(model).items():
        stored = next((one for one in (name, name.removeprefix(prefix)) if one in reader.stored), None)
        if stored is not None:
            yield stored, name, value


def _check_before(reader: CheckpointReader, outline: Any) -> None:
    """Before memory is taken: what the config asks for is in the files. Conversions move values and make none."""
    check_buffers(outline)
    for stored, _, value in () if changes_stored(outline) else _same_names(reader, outline):
        reader.check_one(stored, TensorFacts.of(stored, value))
    wanted = sum(value.numel() for value in own_tensors(outline).values())
    there = sum(math.prod(facts.shape) for facts in reader.stored.values())
    if wanted > there:
        raise CheckpointError(f"{reader.folder.path}: the config asks for {wanted} values, and the files have {there}")


def _check_after(reader: CheckpointReader, outline: Any, model: Any, found: Mapping[str, Any]) -> None:
    """What transformers itself lets pass, or only logs."""
    path = reader.folder.path
    left = min(found["unexpected_keys"], default=None)
    if found["missing_keys"]:
        hint = "" if left is None else f"; it has {left}, which the model lacks"
        raise CheckpointError(f"{path} lacks the tensor {min(found['missing_keys'])}{hint}")
    for name, there, wanted in found["mismatched_keys"]:
        raise CheckpointError(f"{path}: {name} is {list(there)}, the model's is {list(wanted)}")
    if left is not None:
        raise CheckpointError(f"{path}: {left} is no tensor of the model")
    for target, source in tied_names(outline).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            raise CheckpointError(
                f"{path}: the config says that {target} is {source}, and the files have two tensors that differ; set "
                "tie_word_embeddings to false in config.json"
            )


def _keep_dtypes(reader: CheckpointReader, model: Any) -> set[str]:
    """Give tensors the dtype that they are stored in; names, in the folder, of all that have it."""
    kept = set()
    for stored, name, value in list(_same_names(reader, model)):
        if value.shape == reader.stored[stored].shape:
            kept.add(stored)
            if value.dtype != reader.stored[stored].dtype:
                set_parameter(model, name, reader.read(stored))
    model.tie_weights()
    return kept


@contextmanager
def silent() -> Iterator[None]:
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


def notes_in(folder: SafeFolder, name: str) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors. Raises `CheckpointError`."""
    path = folder.file(name)
    with _naming(folder.path / name), _opened(path) as file:
        return dict(file.metadata() or {})


def _placed(folder: SafeFolder) -> dict[str, list[str]]:
    """The files of an index with the names that it puts there; empty where there is one file without an index."""
    if folder.has(SINGLE):
        return {}
    if not folder.has(INDEX):
        pickles = sorted(path.name for path in folder.path.iterdir() if _PICKLES.fullmatch(path.name))
        if pickles:
            raise CheckpointError(
                f"{folder.path / pickles[0]} is a pickle, which can run code and is never read; convert the model to "
                "safetensors first (save_pretrained of transformers does so)"
            )
        raise CheckpointError(
            f"{folder.path} has neither {SINGLE} nor {INDEX}: no checkpoint, or not written to its end"
        )
    places = folder.json(INDEX, _MAX_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder.path / INDEX} has no weight_map")
    found: dict[str, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder.path / INDEX} puts {name} into {file!r}, which is no safetensors file")
        found.setdefault(file, []).append(name)
    for file in found:
        folder.file(file)
    return found


def _header(folder: SafeFolder, name: str) -> Iterator[TensorFacts]:
    """What a file says about its tensors. The library checks the header, and sizes and offsets by the file's length."""
    path = folder.file(name)
    known = stored_dtypes()
    with _naming(folder.path / name), _opened(path) as tensors:
        for tensor in tensors.keys():  # noqa: SIM118  (no mapping)
            part = tensors.get_slice(tensor)
            code = part.get_dtype()
            if code not in known:
                raise CheckpointError(f"{folder.path / name}: {tensor} has the dtype {code}, which is not supported")
            yield TensorFacts(tensor, tuple(part.get_shape()), known[code])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(path, "pt", backend="pread") as file:  # mapped pages would count as memory until it is closed
        yield file


@contextmanager
def _naming(what: object) -> Iterator[None]:
    """Errors of the library and the system, with the name of the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what} cannot be read: {error}") from error
