"""quality_store: what was measured is found again, and only for the same model and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxfusion.analysis.intervals import Estimate
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.quality_store import QualityStore, batches_digest
from fxfusion.errors import FxFusionError
from fxfusion.files import RECORD

ONE = Quality(loss=Estimate(1.0, 0.5, 1.5), perplexity=Estimate(2.7, 1.6, 4.5), tokens=7, sequences=2)


def test_measurements_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plans.json"
    store = QualityStore(path, {"model": "a"})
    assert store.get("plan") is None
    store.put("plan", ONE)
    again = QualityStore(path, {"model": "a"})
    assert again.get("plan") == ONE and again.get("other") is None
    assert sorted(file.name for file in path.parent.iterdir()) == [RECORD, "plans.json"], "nothing half-written is left"
    with pytest.raises(FxFusionError, match="another model or text"):
        QualityStore(path, {"model": "b"})


def test_without_a_path_they_stay_in_memory() -> None:
    store = QualityStore(None, {})
    store.put("plan", ONE)
    assert store.get("plan") == ONE


def test_texts_are_told_apart() -> None:
    ids = torch.arange(8).reshape(2, 4)
    assert batches_digest([ids]) == batches_digest([{"input_ids": ids.clone()}]) != batches_digest([ids, ids])
    assert batches_digest([ids]) != batches_digest([ids + 1]) and batches_digest([ids]) != batches_digest([ids.T])
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert batches_digest([masked]) != batches_digest([ids])
