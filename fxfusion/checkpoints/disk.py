"""The few operations that change a disk: every write of a checkpoint goes through here.

So there is one place that knows which step can fail, and a test can fail each of them in turn.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD: names are relative to the working directory
# What a system or file system without exchange answers.
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def create(path: Path) -> IO[bytes]:
    """A new file to write to; without a buffer, so that a write that fails does so at once."""
    return open(path, "xb", buffering=0)


def write(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write all of it at the file's position."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def write_file(path: Path, data: bytes | str) -> None:
    """A new file with this content."""
    with create(path) as file:
        write(file, data.encode() if isinstance(data, str) else data)


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
