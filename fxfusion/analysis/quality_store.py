"""Measured qualities by plan, in memory and in a file that is whole at every moment."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfusion.analysis.batches import Batch
from fxfusion.analysis.quality import Estimate, Quality
from fxfusion.analysis.resume import read_json, write_json
from fxfusion.errors import FxFusionError
from fxfusion.files import adopt


class QualityStore:
    """`path` None: in memory alone. `identity`: of what was measured; a file with another one is an error."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self.known: dict[str, dict[str, Any]] = {}
        stored = None if self.path is None else read_json(self.path, "measured qualities")
        if stored is None or self.path is None:
            return
        if stored.get("identity") != self.identity:
            raise FxFusionError(
                f"{self.path} holds measurements of another model or text (or of an older fxfusion); use another folder"
            )
        self.known = stored["plans"]
        adopt(self.path)

    def get(self, key: str) -> Quality | None:
        found = self.known.get(key)
        if found is None:
            return None
        values: dict[str, Any] = {
            name: Estimate(**value) if isinstance(value, dict) else value for name, value in found.items()
        }
        return Quality(**values)

    def put(self, key: str, quality: Quality) -> None:
        self.known[key] = asdict(quality)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"identity": self.identity, "plans": self.known})


def batches_digest(batches: Sequence[Batch]) -> str:
    """Tells texts apart, whatever device they are on."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else [("input_ids", batch)]:
            digest.update(f"{name} {list(value.shape)}".encode() if isinstance(value, Tensor) else repr(value).encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().to(torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]
