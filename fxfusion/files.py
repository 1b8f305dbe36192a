"""What fxfusion may write over: its own earlier files, as it left them, and nothing else unless it is told to.

    results/.fxfusion_files.json     {"files": {"plan.yaml": {"kind": "plan", "marks": ["4711 9f86d0..."]}}}

Each folder that fxfusion writes files into has such a record of them. A file counts as ours while its content is what
the record says, and is replaced by a file of the same kind only; one that was edited, copied there or made by others
is kept. The record is written before the file takes its place, so a process that dies leaves no file of ours unknown.
Every write of one file goes through `replacing` (what others cannot have there, through `whole`); folders of models
through `checkpoints.folder`, by the same record.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fxfusion.errors import FxFusionError, OptionError

RECORD = ".fxfusion_files.json"
_WHOLE = 2**26  # bytes up to which the whole content counts; of larger files, size, time and the first of them
_MAX_RECORD = 2**24
_KEPT = 2  # marks of one file: of the one that is there, and of the one that is about to be

PathLike = str | os.PathLike[str]

# What this process found to be its own by what is inside: measurements that name their model and text, say.
_adopted: dict[str, str] = {}


@contextmanager
def replacing(
    path: PathLike, kind: str, *, overwrite: bool = False, error: type[FxFusionError] = OptionError
) -> Iterator[Path]:
    """A path beside the target, with its suffix, to write to; it then takes the target's place, whole and on the disk.

    A link stays a link, and permissions stay. Where anything fails, the target is as it was, and nothing is left.

    Args:
        kind: what the file is, such as "plan": only an earlier file of this kind is replaced.
        overwrite: replace whatever file is there.

    Raises:
        `error`: the target is not ours, is a folder, or cannot be written.
    """
    try:
        check_file(path, kind, overwrite=overwrite, error=error)
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as scratch:
            yield scratch
            if target.exists():
                shutil.copymode(target, scratch)
            _note(target, kind, mark(scratch))
    except (OSError, UnicodeError, ValueError) as problem:
        if isinstance(problem, FxFusionError):
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{os.fspath(path)}: cannot be written (nothing was changed): {reason}") from problem


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """The same for any file, without a look at whose it is."""
    scratch = target.with_name(f".{uuid.uuid4().hex[:12]}.{target.name}")
    try:
        yield scratch
        with open(scratch, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def check_file(
    path: PathLike,
    kind: str,
    *,
    overwrite: bool = False,
    reads: Iterable[PathLike] = (),
    error: type[FxFusionError] = OptionError,
) -> None:
    """Raises where `replacing` would, before long work; and where a command would write over what it reads.

    `reads`: files and folders that the same command reads. They are kept even with `overwrite`.
    """
    name, target = os.fspath(path), Path(os.path.realpath(path))
    if not target.name or target.is_dir():
        raise error(f"{name} is a folder: name a file")
    if not target.exists():
        return
    if any(same(target, read) for read in reads):
        raise error(f"{name} is read by the same command: name another file")
    if is_ours(target, kind) or _adopted.get(str(target)) == mark(target):
        return
    inside = next(
        (read for read in reads if Path(read).is_dir() and target.is_relative_to(os.path.realpath(read))), None
    )
    if inside is not None:
        raise error(f"{name} is a file of {os.fspath(inside)}, which the same command reads: name another file")
    if not overwrite:
        raise error(
            f"{name} is there, and is no {kind} as fxfusion wrote it: name another file, or give --overwrite "
            "(overwrite=True)"
        )


def check_apart(folder: PathLike, reads: Iterable[PathLike], error: type[FxFusionError] = OptionError) -> None:
    """Raises where replacing a folder would take away something that the same command reads; `overwrite` or not."""
    target = Path(os.path.realpath(folder))
    for read in reads:
        real = Path(os.path.realpath(read))
        if same(target, real) or real.is_relative_to(target):
            raise error(
                f"{os.fspath(folder)} is or holds {os.fspath(read)}, which the same command reads: it would be lost; "
                "name another folder"
            )


def same(one: PathLike, other: PathLike) -> bool:
    """Whether both names lead to one file or folder: by links, or in a file system that takes a for A."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    with suppress(OSError):
        return os.path.samefile(one, other)
    return False


def is_ours(path: Path, kind: str) -> bool:
    """Whether the record of its folder has this file as it is, written as this."""
    entry = read_record(path.parent)["files"].get(path.name)
    return entry is not None and entry["kind"] == kind and mark(path) in entry["marks"]


def adopt(path: Path) -> None:
    """Take a file for ours as it is now, because what is in it says so (the caller has read and checked it)."""
    with suppress(OSError):
        _adopted[os.path.realpath(path)] = mark(path)


def mark(path: Path) -> str:
    """What tells a file's content from others: size and hash; of large files size, time of writing and first bytes."""
    facts = os.stat(path)
    with open(path, "rb") as file:
        if facts.st_size <= _WHOLE:
            return f"{facts.st_size} {hashlib.sha256(file.read()).hexdigest()[:32]}"
        head = hashlib.sha256(file.read(2**20)).hexdigest()[:32]
        return f"{facts.st_size} {head} {facts.st_mtime_ns}"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder; one without files where there is none, or none of ours."""
    empty: dict[str, Any] = {"files": {}}
    try:
        with open(folder / RECORD, "rb") as file:
            found = json.loads(file.read(_MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return empty
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict):
        return empty
    good = {
        name: entry
        for name, entry in files.items()
        if isinstance(entry, dict) and isinstance(entry.get("kind"), str) and isinstance(entry.get("marks"), list)
    }
    return {**found, "files": good}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of a folder, whole at every moment."""
    with whole(folder / RECORD) as scratch:
        scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _note(target: Path, kind: str, written: str) -> None:
    """Put into the record what is about to be there, beside what is there."""
    record = read_record(target.parent)
    known = record["files"].get(target.name, {"marks": []})["marks"]
    if target.name in record["files"] and record["files"][target.name]["kind"] != kind:
        known = []
    marks = list(dict.fromkeys([written, *known]))[:_KEPT]
    files = {**record["files"], target.name: {"kind": kind, "marks": marks}}
    write_record(target.parent, {**record, "files": files})
