"""Replace a checkpoint folder as a whole: the old one stays loadable until the new one is complete.

    .model.1f9c03ab.partial   the new folder, written and waited for (fsync)
    model                     the old one
    -> the two names are exchanged in one step, and then the old folder is removed

Where the system cannot exchange names, two renames do it (`model` to `.model.<id>.old`, then the new one to `model`),
and `existing` finds the old folder again if the process dies between them. A writer locks the folder that it
writes, so that the next one can tell what a dead process left behind, and remove it. Every step that changes the disk
is one of the few functions at the end, so that a test can fail each of them in turn.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from fxfusion.errors import CheckpointError
from fxfusion.files import RECORD, PathLike, check_apart, mark, read_record

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_KIND = "model folder"
# In a folder that is being written; the same is in the record of a whole one.
_WRITING = ".fxfusion_writing.json"
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD: names are relative to the working directory
# What a system or file system without exchange answers.
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


@contextmanager
def replacing(directory: PathLike, *, overwrite: bool = False, reads: Iterable[PathLike] = ()) -> Iterator[Path]:
    """A new, empty folder to fill, which then takes the place of `directory` in one step.

    An error or a killed process leaves `directory` as it was; what is left beside it goes with the next write.
    `directory` may be missing, empty, a link to a folder, or a folder that was written here and has not changed since,
    by its own record (`fxfusion.files`); nothing of it is kept.

    Args:
        overwrite: replace a folder with anything in it.
        reads: folders and files that are read for this one, which it may not take away.

    Raises:
        CheckpointError: `directory` is something else, or it cannot be written (a full disk, say).
    """
    target = _target(directory, overwrite, reads)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        name = uuid.uuid4().hex[:8]
        fresh, old = (target.with_name(f".{target.name}.{name}.{ending}") for ending in ("partial", "old"))
        about = {"of": target.name, "beside": [fresh.name, old.name]}
        make_folder(fresh)
        with _locked(fresh):
            try:
                write_file(fresh / _WRITING, json.dumps(about) + "\n")
                yield fresh
                _record(fresh, about)
                remove(fresh / _WRITING)
                _sync_all(fresh)
                _put_in_place(fresh, target, old)
            finally:
                _discard(fresh)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{directory} cannot be written (nothing was changed there): {reason}") from error
    try:
        sync(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{directory} is written, but the disk does not confirm it: {reason}") from error


def check_replaceable(directory: PathLike, *, overwrite: bool = False, reads: Iterable[PathLike] = ()) -> None:
    """Raises `CheckpointError` where `replacing` would, before hours of work go into what it is to hold."""
    _target(directory, overwrite, reads)


def existing(directory: PathLike) -> Path:
    """The folder to read for `directory`, put back in its place where a write stopped half-way.

    Raises `CheckpointError` where there is no folder.
    """
    target = Path(directory)
    if target.is_dir():
        return target
    if target.exists():
        raise CheckpointError(f"{directory} is a file, not a checkpoint folder")
    old = _ours(Path(os.path.realpath(target)), "old")
    if not old:
        raise CheckpointError(f"{directory} does not exist")
    try:
        rename(old[0], Path(os.path.realpath(target)))
    except PermissionError:  # somebody who may only read reads it where it is
        return old[0]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be put back from {old[0]}: {error.strerror or error}") from error
    return target


def _target(directory: PathLike, overwrite: bool, reads: Iterable[PathLike]) -> Path:
    """The folder itself, where a link leads to it; checked to be one that may be replaced."""
    target = Path(os.path.realpath(directory))
    if not target.name:
        raise CheckpointError(f"{directory} is no name for a checkpoint folder")
    check_apart(target, reads, CheckpointError)
    if not target.exists():
        return target
    if not target.is_dir():
        raise CheckpointError(f"{directory} is a file: choose another folder")
    other = _first_of_others(target)
    if other is None:
        return target
    if not overwrite:
        raise CheckpointError(
            f"{directory} is not replaced, since it is not as fxfusion wrote it: {other}; choose another folder, move "
            "what is in it, or give --overwrite (overwrite=True)"
        )
    for kept in (Path.home(), Path.cwd()):
        if kept.resolve().is_relative_to(target):
            raise CheckpointError(f"{directory} is or holds {kept}: choose another folder")
    return target


def _first_of_others(folder: Path) -> str | None:
    """What in a folder is not as an earlier write left it, by the folder's record; None where all is as it was."""
    record = read_record(folder)["files"]
    known = {parent.as_posix() for name in record for parent in PurePosixPath(name).parents}
    for path, folders, names in os.walk(folder):
        for name in sorted([*names, *folders]):
            found = Path(path, name)
            relative = found.relative_to(folder).as_posix()
            if relative == RECORD or (relative in known and found.is_dir() and not found.is_symlink()):
                continue
            entry = record.get(relative)
            if entry is None or entry["kind"] != _KIND or found.is_symlink() or not found.is_file():
                return f"it holds {relative}, which is by others"
            if mark(found) not in entry["marks"]:
                return f"{relative} was changed since"
    return None


def _record(folder: Path, about: dict[str, Any]) -> None:
    """Write down what is in a folder, so that a later write knows it again."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in sorted(names):
            file = Path(path, name)
            if file.relative_to(folder).as_posix() not in (RECORD, _WRITING):  # that of single files, if there is one
                found[file.relative_to(folder).as_posix()] = {"kind": _KIND, "marks": [mark(file)]}
    if (folder / RECORD).exists():
        remove(folder / RECORD)
    write_file(folder / RECORD, json.dumps({**about, "files": found}, indent=1) + "\n")


def _put_in_place(fresh: Path, target: Path, old: Path) -> None:
    """The new folder under the name of the old one; what was there is then `fresh`, or gone."""
    if not target.exists():
        rename(fresh, target)
    elif not exchange(fresh, target):
        rename(target, old)
        try:
            rename(fresh, target)
        except OSError:
            rename(old, target)
            raise
        _discard(old)


def _clean_up(target: Path) -> None:
    """Finish or remove what dead processes left beside the target."""
    if not target.exists():
        for old in _ours(target, "old")[:1]:
            rename(old, target)
    for path in (*_ours(target, "partial"), *_ours(target, "old")):
        if not _is_locked(path):
            _discard(path)


def _ours(target: Path, ending: str) -> list[Path]:
    """What a write of this folder left beside it, by what it says itself, or what the folder that replaced it says.

    What died as the first thing in it was written has nothing in it that could be lost.
    """
    found = [path for kind in ("partial", "old") for path in _left_over(target, kind)]
    said = {name for path in (target, *found) for name in _beside_of(path, target)}
    return [
        path
        for path in found
        if path.name.endswith(f".{ending}")
        and (path.name in said or (ending == "partial" and {one.name for one in path.iterdir()} <= {_WRITING}))
    ]


def _beside_of(path: Path, target: Path) -> list[str]:
    """The names that a write of the target took, by what it noted in this folder."""
    for name in (RECORD, _WRITING):
        try:
            found = json.loads((path / name).read_text("utf-8"))
            if found["of"] == target.name:
                return [str(each) for each in found["beside"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []


def _discard(path: Path) -> None:
    """Remove a folder that nobody needs. If that fails it is in nobody's way, and the next write tries again."""
    if not path.exists():
        return
    try:
        remove(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror or error}", stacklevel=2)


def _sync_all(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))


def _left_over(target: Path, ending: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{ending}")
    if not target.parent.is_dir():
        return []
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, under whatever name, until the process lets go of it or dies."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    """True also where the system cannot tell: then what a dead process left stays."""
    if fcntl is None:
        return True
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


def write_file(path: Path, data: bytes | str) -> None:
    """A new file with this content."""
    with create(path) as file:
        write(file, data.encode() if isinstance(data, str) else data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """A new safetensors file with these tensors, contiguous ones on the CPU that share no memory; none is copied."""
    with create(path) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    serialize(path, tensors, notes)
    path.chmod(mode)  # the library makes files that their owner alone can read


def create(path: Path) -> IO[bytes]:
    return open(path, "xb")


def write(file: IO[bytes], data: bytes) -> None:
    file.write(data)


def serialize(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, {"format": "pt", **(notes or {})})
    except SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    path.mkdir()


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name; a folder's new name must be free, or that of an empty folder."""
    os.rename(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step. False, and nothing done, where the system cannot do that."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _renameat2() -> Callable[..., int] | None:
    """The function of the C library; None where it has none (other systems than Linux)."""
    try:
        found: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    return found
