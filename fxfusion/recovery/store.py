"""A refit that was stopped goes on: each finished layer is written down with its new parameters.

refit.json               what was asked for, and what came of each layer
refit_<n>.safetensors    parameters of the n-th layer, where they changed
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfusion.analysis.resume import check_facts, read_json, write_json, write_tensors
from fxfusion.errors import OptionError
from fxfusion.files import adopt
from fxfusion.recovery.fit import Fitted
from fxfusion.recovery.projections import Projection

_FILE = "refit.json"


class Store:
    """Nothing is read or written where `folder` is None. Raises `OptionError` where it holds another refit."""

    def __init__(self, folder: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.facts = dict(facts)
        self.done: list[dict[str, Any]] = []
        stored = None if self.folder is None else read_json(self.folder / _FILE, "a refit that was stopped")
        if stored is not None:
            check_facts(stored.get("facts"), self.facts, self.folder)
            self.done = list(stored.get("done", []))
            adopt(Path(folder or "") / _FILE)

    def load(self, model: nn.Module, projections: list[Projection]) -> list[Fitted]:
        """Put what is known into the model. Raises `OptionError` where a file is missing or does not fit."""
        found = []
        for number, entry in enumerate(self.done):
            fitted, projection = Fitted(**entry["fitted"]), projections[number]
            if fitted.applied:
                self._put(model, projection, number)
            found.append(fitted)
        return found

    def add(self, model: nn.Module, projection: Projection, fitted: Fitted) -> None:
        if self.folder is None:
            return
        names = [name for name in (projection.weight, projection.bias) if name is not None]
        if fitted.applied:
            write_tensors(self._file(len(self.done)), {name: model.get_parameter(name) for name in names})
        self.done.append({"name": projection.name, "fitted": asdict(fitted)})
        write_json(self.folder / _FILE, {"facts": self.facts, "done": self.done})

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"refit_{number}.safetensors"

    def _put(self, model: nn.Module, projection: Projection, number: int) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._file(number)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise OptionError(f"{path} cannot be read ({error}); delete the folder to start anew") from error
        for name in (projection.weight, projection.bias):
            if name is None:
                continue
            value = model.get_parameter(name)
            if name not in tensors or tensors[name].shape != value.shape:
                raise OptionError(f"{path} does not hold {name} {list(value.shape)}; delete the folder to start anew")
            with torch.no_grad():
                value.copy_(tensors[name])
