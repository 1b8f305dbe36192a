"""The measured sums behind attention scores, in memory and in a file: {address: [batch 0, batch 1, ...]}.

"loss without 3,7"        [[812.1, 790.4, ...], ...]     one number for each sequence of each batch
"cosine of 5 without 3"   ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fxfusion.analysis.resume import check_batches, check_facts, read_json, write_json
from fxfusion.errors import OptionError
from fxfusion.files import adopt

Address = tuple[str, tuple[int, ...], int | None]
"""What was measured, without the attention of which layers, for which layer (None: for the whole model)."""

FORMAT = 1
_SECONDS_BETWEEN_WRITES = 1.0
_SHARE_OF_TIME = 20  # and at least so many times what the last write took: a long file must not slow the measuring


class ScoreCache:
    """Used as a context: whatever ends it, an interruption too, what was measured is in the file.

    While it is open the file is written about once a second, so that a killed process loses little.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._header: dict[str, Any] = {}
        self._values: dict[str, list[list[float] | None]] = {}
        self._is_changed = False
        self._write_at = 0.0

    def open(self, model: Callable[[], str], batches: Sequence[str]) -> None:
        """Read the file. `model`: makes the digest of the model; `batches`: digests of the text.

        Raises `OptionError` where the file holds something else, or numbers of another model or text.
        """
        if self.path is None:
            return
        if self.path.is_dir():
            raise OptionError(f"cache must name a file, {self.path} is a folder")
        facts = {"format": FORMAT, "model": model()}
        stored = read_json(self.path, "a cache of attention scores")
        known: Any = []
        if stored is not None:
            check_facts(stored, facts, self.path)
            known, values = stored.get("batches"), stored.get("values")
            lists = [known, *values.values()] if isinstance(values, dict) else [None]
            if not isinstance(values, dict) or not all(isinstance(found, list) for found in lists):
                raise OptionError(f"{self.path} is no cache of attention scores, or was damaged; delete it")
            check_batches(known, batches, self.path)
            self._values = values
        if stored is not None:
            adopt(self.path)
        longest = known if len(known) > len(batches) else batches
        self._header = facts | {"batches": list(longest)}

    def get(self, address: Address, batch: int) -> list[float] | None:
        """The sums of a batch, one for each sequence; None where they were not measured."""
        known = self._values.get(_key(address), [])
        return known[batch] if batch < len(known) else None

    def put(self, address: Address, batch: int, sums: list[float]) -> None:
        known = self._values.setdefault(_key(address), [])
        known.extend([None] * (batch + 1 - len(known)))
        known[batch] = sums
        self._is_changed = True
        if time.monotonic() >= self._write_at:
            self._write()

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def _write(self) -> None:
        if self.path is not None and self._is_changed:
            start = time.monotonic()
            write_json(self.path, self._header | {"values": self._values})
            self._is_changed = False
            end = time.monotonic()
            self._write_at = end + max(_SECONDS_BETWEEN_WRITES, _SHARE_OF_TIME * (end - start))


def _key(address: Address) -> str:
    measure, dropped, layer = address
    of = "" if layer is None else f" of {layer}"
    without = f" without {','.join(map(str, sorted(dropped)))}" if dropped else ""
    return f"{measure}{of}{without}"
