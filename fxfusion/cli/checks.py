"""The checks of `fxfusion check`, one after the other; each needs those before it. Imported when it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfusion.checkpoints.canonical_load import read_plan
from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder
from fxfusion.cli.conversion import Conversion
from fxfusion.errors import FxFusionError
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.surgery_proof import cached_logits, full_logits, proof_tokens, relative

_ROUNDING = 8  # times the dtype's epsilon: attention over stored keys is summed in another order

Verdict = tuple[bool, str]


@dataclass(frozen=True, slots=True)
class Check:
    what: str
    run: Callable[[], Verdict]


@dataclass(slots=True)
class _Folder:
    run: Conversion
    path: Path
    model: Any = None
    logits: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        return proof_tokens(self.model)

    def files(self) -> Verdict:
        reader = CheckpointReader.open(self.path)
        size = sum(facts.nbytes for facts in reader.stored.values())
        return True, f"{len(reader.stored)} tensors, {size / 2**20:,.1f} MiB"

    def loads(self) -> Verdict:
        self.model = self.run.load(self.path)
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        return True, f"{type(self.model).__name__}, {layers} layers, {self.model.dtype}".replace("torch.", "")

    def computes(self) -> Verdict:
        self.logits = full_logits(self.model, self.ids)
        good = bool(self.logits.isfinite().all())
        return good, f"logits of {self.ids.numel()} tokens are {'' if good else 'not '}finite"

    def caches(self) -> Verdict:
        assert self.logits is not None
        try:
            decoded = cached_logits(self.model, self.ids)
        except Exception as error:
            raise FxFusionError(f"decoding with a cache fails: {error}") from error
        if decoded is None:
            return True, "the model has none"
        off, limit = relative(decoded, self.logits), _ROUNDING * torch.finfo(self.logits.dtype).eps
        return off <= limit, f"decoding token by token is off by {off:.1g} (allowed {limit:.1g})"

    def fuses(self) -> Verdict:
        """The fused model as it was read against one that is fused, and proved, from the members."""
        assert self.logits is not None
        plan = read_plan(SafeFolder.of(self.path))
        assert plan is not None
        again = self.run.load(self.path, fused=False)
        members = full_logits(again, self.ids)
        fuse(again, plan)
        off = relative(self.logits, full_logits(again, self.ids))
        limit = _ROUNDING * torch.finfo(self.logits.dtype).eps
        price = relative(self.logits, members)
        words = f"off by {off:.1g} from what `fuse` makes and proves (allowed {limit:.1g})"
        return off <= limit, f"{words}; that is off by {price:.1g} from the model without fusion"


def checks(run: Conversion, path: Path) -> list[Check]:
    """What can be checked of a folder."""
    folder = _Folder(run, path)
    found = [
        Check("files", folder.files),
        Check("loads", folder.loads),
        Check("computes", folder.computes),
        Check("cache", folder.caches),
    ]
    plan = read_plan(SafeFolder.of(path))
    if plan is not None and plan.groups:
        found.append(Check("fused", folder.fuses))
    return found
