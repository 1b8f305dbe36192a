"""Dependency matrices on disk: a finished one, and the sums of one that is being measured.

    matrix.safetensors   values, cosine, ratio, contribution_cosine
    matrix.json          unit, layers, names, ..., and the digest of the file that it belongs to

    sums_<batches>.safetensors   the sums over those batches, float64
    state.json                   what is measured, which file holds the sums, digests of the batches in them

The sums go to a file of a new name, then the JSON is replaced: a process killed at any moment leaves a pair that fits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fxfusion.analysis.resume import check_batches, check_facts, read_json, remove_others, write_json, write_tensors
from fxfusion.errors import OptionError
from fxfusion.files import adopt

FORMAT = 1


@dataclass(slots=True)
class MatrixState:
    """Sums over the batches measured so far. `batches`: their digests."""

    folder: Path | None
    facts: dict[str, Any]
    batches: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str] | None, facts: Callable[[], dict[str, Any]], batches: Sequence[str]
    ) -> MatrixState:
        """The state in a folder, or a new one. `facts`: what it must be about; `batches`: digests of the text.

        Raises `OptionError` where the folder holds something else.
        """
        if folder is None:
            return cls(None, {})
        path = Path(folder)
        given = {"format": FORMAT, **facts()}
        if path.exists() and not path.is_dir():
            raise OptionError(f"resume must name a folder, {path} is a file")
        stored = read_json(path / "state.json", "the state of a dependency matrix")
        if stored is None:
            return cls(path, given)
        check_facts(stored, given, path)
        known = _texts(stored, "batches", path)
        check_batches(known, batches, path)
        if len(known) > len(batches):
            raise OptionError(f"{path} holds the sums over {len(known)} batches, more than the {len(batches)} given")
        tensors = path / Path(str(stored.get("tensors"))).name
        sums = _read_tensors(tensors, str(stored.get("digest")))
        for file in (path / "state.json", tensors):
            adopt(file)
        return cls(path, given, known, sums)

    @property
    def done(self) -> int:
        """Number of batches measured."""
        return len(self.batches)

    def add(self, batch: str, sums: dict[str, Tensor]) -> None:
        """Add the sums over one more batch, and write."""
        self.sums = {name: self.sums[name] + value if self.sums else value for name, value in sums.items()}
        self.batches.append(batch)
        if self.folder is None:
            return
        tensors = self.folder / f"sums_{self.done:06d}.safetensors"
        write_tensors(tensors, self.sums)
        pair = {"tensors": tensors.name, "digest": _digest(tensors)}
        write_json(self.folder / "state.json", {**self.facts, **pair, "batches": self.batches})
        remove_others("sums_*.safetensors", tensors)


def save_matrix(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a finished matrix. Raises `OptionError`."""
    path = folder / "matrix.safetensors"
    write_tensors(path, tensors)
    write_json(folder / "matrix.json", {"format": FORMAT, "tensors": _digest(path), **facts})


def load_matrix(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a saved matrix. Raises `OptionError`."""
    path = folder / "matrix.json"
    facts = read_json(path, "a dependency matrix")
    if facts is None:
        raise OptionError(f"there is no dependency matrix in {folder}: {path.name} is missing")
    check_facts(facts, {"format": FORMAT}, path)
    tensors = _read_tensors(folder / "matrix.safetensors", str(facts.pop("tensors", "")))
    del facts["format"]
    return tensors, facts


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise OptionError(f"{path} is missing")
    if _digest(path) != digest:
        raise OptionError(f"{path} does not belong to the JSON file beside it, or was damaged; delete both")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _texts(stored: dict[str, Any], name: str, where: Path) -> list[str]:
    found = stored.get(name)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise OptionError(f"{where} is no state of a dependency matrix: {name} is no list of digests")
    return found
