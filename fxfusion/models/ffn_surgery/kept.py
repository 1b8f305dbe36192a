"""The weights that folding rounds, kept on disk while later groups may still fail.

In memory they would take the model's weights a second time. Files are in the system's folder for temporary files
(`TMPDIR` names another), and are gone when `fuse` returns or raises.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.layout import Tensors
from fxfusion.models.ffn_surgery.widen import set_parameter


class KeptWeights:
    """Weights of the members of finished groups, bit for bit. A context: its files go with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fxfusion_fuse_", ignore_cleanup_errors=True)
        self._files: list[Path] = []

    def __enter__(self) -> KeptWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def keep(self, weights: Tensors) -> None:
        """Write them. Raises `SurgeryError` where the disk does not take them."""
        real = {name: value for name, value in weights.items() if not value.is_meta}
        if not real:
            return
        file = Path(self._folder.name) / f"{len(self._files)}.pt"
        try:
            torch.save(real, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk is full
            raise SurgeryError(
                f"the members' weights cannot be kept on disk until all groups are proved: {error} (norm='last' "
                "needs no copy; TMPDIR names another folder)"
            ) from error
        self._files.append(file)

    def put_back(self, model: nn.Module) -> None:
        """Give the model all that was kept. Its modules are those of before by now."""
        for file in self._files:
            for name, value in torch.load(file).items():
                set_parameter(model, name, value)
