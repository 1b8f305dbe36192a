"""Results that stop and go on: plain values in a JSON file, with what they are results of; tensors in files beside it.

    plans.json                     {"format": 2, "facts": {"model": "9f86...", "text": "..."}, "plans": {...}}
    state.json                     {"format": 2, "facts": {...}, "sums": {"file": "state_3fa9c1.safetensors", ...}}
    state_3fa9c1.safetensors

Every file is whole at every moment. Tensors go to a file that is named by its content, and count once the JSON file
names it: a process killed at any moment leaves a pair that fits. What it names no more is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fxfusion.errors import OptionError
from fxfusion.files import adopt, is_ours, replacing
from fxfusion.models.fingerprint import tensors_digest
from fxfusion.models.traced import TracedModel

MEASURED = "measurements"
FORMAT = 2
_TENSORS = "_[0-9a-f]{12}.safetensors"
_SECONDS_BETWEEN_WRITES = 1.0
_SHARE_OF_TIME = 20  # and at least so many times what the last write took: a long file must not slow the measuring


class Store:
    """`data`: the values, by name. Nothing is read or written where `path` is None.

    As a context: whatever ends it, an interruption too, what was `changed` is in the file.

    Args:
        path: of the JSON file.
        what: it holds, in words.
        facts: what tells these results from others, plain data; called only where there is a path.

    A file of another version of fxfusion counts as missing, with a warning.

    Raises:
        OptionError: the path is a folder, or the file holds something else, or results of something else.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, what: str, facts: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self.path, self.what = None if path is None else Path(path), what
        self.data: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._is_changed, self._has_kept, self._write_at = False, False, 0.0
        if self.path is None:
            return
        if self.path.is_dir():
            raise OptionError(f"{self.path} is a folder: name a file for {what}")
        self._facts = {"format": FORMAT, "facts": dict(facts())}
        stored = _read(self.path, what)
        if stored is None:
            return
        if stored.get("format") != FORMAT and is_ours(self.path, MEASURED):
            warnings.warn(f"{self.path} is of another version of fxfusion: it does not count", stacklevel=3)
            return
        found = stored.get("facts")
        given = {"format": FORMAT, **self._facts["facts"]}
        _check({**(found if isinstance(found, dict) else {}), "format": stored.get("format")}, given, self.path)
        adopt(self.path)
        self.data = {name: value for name, value in stored.items() if name not in self._facts}

    def save(self) -> None:
        """Write what is in `data`. Raises `OptionError` where that cannot be done, with the old file in place."""
        if self.path is None:
            return
        start = time.monotonic()
        text = json.dumps(self._facts | self.data, indent=1, allow_nan=False) + "\n"
        with replacing(self.path, MEASURED) as scratch:
            scratch.write_text(text, encoding="utf-8")
        for old in self.path.parent.iterdir() if self._has_kept else ():
            is_named = old.name in text or not re.fullmatch(re.escape(self.path.stem) + _TENSORS, old.name)
            if not is_named and is_ours(old, MEASURED):
                old.unlink(missing_ok=True)
        end = time.monotonic()
        self._is_changed, self._write_at = False, end + max(_SECONDS_BETWEEN_WRITES, _SHARE_OF_TIME * (end - start))

    def changed(self) -> None:
        """Write about once a second, so that a killed process loses little; the rest at the end of the context."""
        self._is_changed = True
        if time.monotonic() >= self._write_at:
            self.save()

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write tensors; `data` is to hold what this returns, and `save` makes it count."""
        if self.path is None:
            return {}
        from safetensors.torch import save

        content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        path = self.path.with_name(f"{self.path.stem}_{digest[:12]}.safetensors")
        with replacing(path, MEASURED, overwrite=True) as scratch:  # named by its content: nothing else has this name
            scratch.write_bytes(content)
        self._has_kept = True
        return {"file": path.name, "digest": digest}

    def tensors(self, kept: Any, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What `keep` wrote, bit by bit. Raises `OptionError` where it is not there, not whole, or unlike `like`."""
        if self.path is None or not isinstance(kept, dict) or not {"file", "digest"} <= kept.keys():
            raise self.broken("it names no file of tensors")
        from safetensors.torch import load

        path = self.path.with_name(Path(str(kept["file"])).name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise self.broken(f"{path} cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != kept["digest"]:
            raise self.broken(f"{path} does not belong to it, or was damaged")
        found: dict[str, Tensor] = load(content)
        for name, value in (like or {}).items():
            if name not in found or found[name].shape != value.shape:
                raise self.broken(f"{path} does not hold {name} {list(value.shape)}")
        adopt(path)
        return found

    def broken(self, why: str) -> OptionError:
        return OptionError(f"{self.path} is not {self.what} as fxfusion writes it ({why}); delete it to start anew")

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_changed:
            self.save()


def inside(folder: str | os.PathLike[str] | None, name: str) -> Path | None:
    """A path in a folder, for a `Store`; None where there is no folder."""
    return None if folder is None else Path(folder) / name


def model_key(traced: TracedModel) -> str:
    """Digest over every byte of all parameters and buffers, and what attention is left out.

    Reads every weight once. Raises `OptionError` where the model has no weights (meta device).
    """
    tensors = tensors_digest(traced.model)
    if tensors is None:
        raise OptionError(f"{type(traced.model).__name__} is on the meta device: there is nothing to measure")
    return hashlib.sha256(f"{tensors} without {traced.dropped_attention}".encode()).hexdigest()[:16]


def check_batches(stored: Sequence[str], given: Sequence[str], where: object) -> None:
    """Raises `OptionError` unless the digests agree as far as both go: text may be added at the end, or left out."""
    for number, (one, other) in enumerate(zip(stored, given, strict=False)):
        if one != other:
            raise OptionError(f"{where} holds measurements on other text: batch {number} differs; use another place")


def _check(stored: Mapping[str, Any], given: Mapping[str, Any], where: Path) -> None:
    """Raises `OptionError` that names what is different; of files of another version no more than that."""
    wrong = [
        f"{name} is {stored.get(name)}, here it is {now}" for name, now in given.items() if stored.get(name) != now
    ]
    if wrong:
        words = "; ".join(wrong[:1] if stored["format"] != FORMAT else wrong)
        raise OptionError(f"{where} holds another measurement ({words}); use another place or delete it")


def _read(path: Path, what: str) -> dict[str, Any] | None:
    """The object in a file, None where there is no file. Raises `OptionError` where there is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as {what}: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path} is not {what}: it holds a {type(found).__name__}")
    return found
