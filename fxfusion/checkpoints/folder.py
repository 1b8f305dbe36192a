"""Replace a checkpoint folder as a whole: the old one stays loadable until the new one is complete.

    .model.1f9c03ab.partial   the new folder, written and waited for (fsync)
    model                     the old one
    -> the two names are exchanged in one step, and then the old folder is removed

Where the system cannot exchange names, two renames do it (`model` to `.model.<id>.old`, then the new one to `model`),
and `existing` finds the old folder again if the process dies between them. A writer locks the folder that it
writes, so that the next one can tell what a dead process left behind, and remove it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxfusion.checkpoints import disk
from fxfusion.errors import CheckpointError

# What checkpoints of transformers, and ours, consist of. A folder with anything else is not replaced.
_CHECKPOINT_FILE = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|quantization_config)\.json"
    r"|.*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|merges|chat_template)\.(json|txt|jinja)"
    r"|.*\.(model|tiktoken)|fxfusion_[a-z_]*\.(yaml|json|st)|(configuration|modeling|block_config)[a-z_0-9]*\.py"
    r"|README\.md|LICENSE.*|NOTICE.*|USE_POLICY\.md|\.gitattributes|__pycache__|additional_chat_templates|\.cache"
)


@contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to fill, which then takes the place of `directory` in one step.

    An error or a killed process leaves `directory` as it was; what is left beside it goes with the next write.
    `directory` may be missing, empty, a link to a folder, or a checkpoint, of which nothing is kept: not the
    README.md either. A folder that holds anything else is refused, as it would be lost.

    Raises:
        CheckpointError: `directory` is something else, or it cannot be written (a full disk, say).
    """
    target = _target(directory)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        fresh = _beside(target, "partial")
        disk.make_folder(fresh)
        with _locked(fresh):
            try:
                yield fresh
                _sync_all(fresh)
                _put_in_place(fresh, target)
            finally:
                _discard(fresh)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{directory} cannot be written (nothing was changed there): {reason}") from error
    try:
        disk.sync(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{directory} is written, but the disk does not confirm it: {reason}") from error


def check_replaceable(directory: str | os.PathLike[str]) -> None:
    """Raises `CheckpointError` where `replacing` would, before hours of work go into what it is to hold."""
    _target(directory)


def existing(directory: str | os.PathLike[str]) -> Path:
    """The folder to read for `directory`, put back in its place where a write stopped half-way.

    Raises `CheckpointError` where there is no folder.
    """
    target = Path(directory)
    if target.is_dir():
        return target
    if target.exists():
        raise CheckpointError(f"{directory} is a file, not a checkpoint folder")
    old = _left_over(Path(os.path.realpath(target)), "old")
    if not old:
        raise CheckpointError(f"{directory} does not exist")
    try:
        disk.rename(old[0], Path(os.path.realpath(target)))
    except PermissionError:  # somebody who may only read reads it where it is
        return old[0]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be put back from {old[0]}: {error.strerror or error}") from error
    return target


def _target(directory: str | os.PathLike[str]) -> Path:
    """The folder itself, where a link leads to it; checked to be one that may be replaced."""
    target = Path(os.path.realpath(directory))
    if not target.name:
        raise CheckpointError(f"{directory} is no name for a checkpoint folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise CheckpointError(f"{directory} is a file: choose another folder")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in names if not _CHECKPOINT_FILE.fullmatch(name)]
    if foreign or (names and "config.json" not in names):
        what = f"it holds {foreign[0]}" if foreign else "it has no config.json"
        raise CheckpointError(
            f"{directory} is not replaced, since it is more than a checkpoint or none at all: {what}; "
            "choose another folder, or move what is in it"
        )
    return target


def _put_in_place(fresh: Path, target: Path) -> None:
    """The new folder under the name of the old one; what was there is then `fresh`, or gone."""
    if not target.exists():
        disk.rename(fresh, target)
    elif not disk.exchange(fresh, target):
        old = _beside(target, "old")
        disk.rename(target, old)
        try:
            disk.rename(fresh, target)
        except OSError:
            disk.rename(old, target)
            raise
        _discard(old)


def _clean_up(target: Path) -> None:
    """Finish or remove what dead processes left beside the target."""
    if not target.exists():
        for old in _left_over(target, "old")[:1]:
            disk.rename(old, target)
    for path in (*_left_over(target, "partial"), *_left_over(target, "old")):
        if not _is_locked(path):
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a folder that nobody needs. If that fails it is in nobody's way, and the next write tries again."""
    if not path.exists():
        return
    try:
        disk.remove(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror or error}", stacklevel=2)


def _sync_all(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            disk.sync(Path(path, name))
        disk.sync(Path(path))


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{ending}")


def _left_over(target: Path, ending: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{ending}")
    if not target.parent.is_dir():
        return []
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, under whatever name, until the process lets go of it or dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return True
        raise
    finally:
        os.close(descriptor)
    return False
