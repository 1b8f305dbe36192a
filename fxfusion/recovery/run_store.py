"""Training that was stopped goes on: what has been learned so far is written down whole, or not at all.

recover.json                   what was asked for, which step, the losses, and the name of the file below
recover_<step>.safetensors     weights.*, best.* (on the text for validation), exp_avg.* and exp_avg_sq.* of AdamW
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fxfusion.analysis.resume import check_facts, read_json, remove_others, write_json, write_tensors
from fxfusion.errors import OptionError
from fxfusion.files import adopt

_FILE = "recover.json"
_PARTS = ("weights", "best", "exp_avg", "exp_avg_sq")


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run is. `tensors`: by part and name; `best` is missing where nothing was better than the start.
    `taken`: steps of the optimiser (a gradient scaler leaves some out, its state is `scale`). `validation`: (step, KL)
    of each measurement."""

    step: int = 0
    taken: int = 0
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    scale: dict[str, Any] = field(default_factory=dict)


class RunStore:
    """Nothing is read or written where `folder` is None. Raises `OptionError` where it holds another run."""

    def __init__(self, folder: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.facts = dict(facts)

    def load(self, shapes: Mapping[str, Tensor]) -> Progress:
        """What was kept; a beginning where nothing was. Raises `OptionError` where a file is broken."""
        found = None if self.folder is None else read_json(self.folder / _FILE, "training that was stopped")
        if found is None or self.folder is None:
            return Progress()
        check_facts(found.get("facts"), self.facts, self.folder)
        try:
            step, taken = int(found["step"]), int(found["taken"])
            file, scale = str(found["file"]), dict(found["scale"])
            validation = [(int(at), float(value)) for at, value in found["validation"]]
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(f"{self.folder / _FILE} is broken ({error}); delete the folder to start anew") from error
        tensors = self._read(self.folder / Path(file).name, shapes)
        for path in (self.folder / _FILE, self.folder / Path(file).name):
            adopt(path)
        return Progress(step=step, taken=taken, tensors=tensors, validation=validation, scale=scale)

    def save(self, progress: Progress) -> None:
        """The file with the tensors first; it counts once `recover.json` names it."""
        if self.folder is None:
            return
        path = self.folder / f"recover_{progress.step}.safetensors"
        parts = progress.tensors.items()
        write_tensors(path, {f"{part}.{name}": value for part, own in parts for name, value in own.items()})
        now = {name: getattr(progress, name) for name in ("step", "taken", "scale", "validation")}
        write_json(self.folder / _FILE, {"facts": self.facts, "file": path.name, **now})
        remove_others("recover_*.safetensors", path)

    def _read(self, path: Path, shapes: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise OptionError(f"{path} cannot be read ({error}); delete the folder to start anew") from error
        found: dict[str, dict[str, Tensor]] = {}
        for part in _PARTS:
            if part == "best" and not any(name.startswith("best.") for name in stored):
                continue
            for name, like in shapes.items():
                value = stored.get(f"{part}.{name}")
                if value is None or value.shape != like.shape:
                    raise OptionError(f"{path} lacks {part}.{name} {list(like.shape)}; delete the folder to start anew")
                found.setdefault(part, {})[name] = value
        return found
