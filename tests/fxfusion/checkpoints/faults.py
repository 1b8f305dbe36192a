"""A disk that fills up, or a process that dies, at the n-th operation that `checkpoints.folder` is asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from fxfusion.checkpoints import folder

OPERATIONS = ("create", "write", "serialize", "sync", "make_folder", "rename", "exchange", "remove")
NEEDS_SPACE = ("create", "write", "serialize", "make_folder")


class Killed(BaseException):
    """Nothing catches it, as nothing runs after a kill."""


class Faults:
    """`count` operations so far; the one with number `at` fails, and so do all later ones that would then.

    A full disk fails what needs space; a dead process does nothing more at all. Half of a failing write is done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, kind: str = "full") -> None:
        self.count, self.at, self.kind = 0, at, kind
        for name in OPERATIONS:
            monkeypatch.setattr(folder, name, self._counted(name, getattr(folder, name)))

    def _counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if self.at is None or number < self.at or (self.kind == "full" and number > self.at and not needs_space):
                return operation(*args)
            if number == self.at and name == "write":
                operation(args[0], args[1][: len(args[1]) // 2])
            if number == self.at and name == "serialize":
                operation(*args)
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            raise Killed(name) if self.kind == "kill" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        needs_space = name in NEEDS_SPACE
        return counted


def count_operations(run: Callable[[], object]) -> int:
    """How many there are in a run that succeeds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        faults = Faults(monkeypatch, None)
        run()
    return faults.count
