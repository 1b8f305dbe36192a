"""Limits, and how many parts fit into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxfusion.errors import OptionError
from fxfusion.recovery import memory
from fxfusion.recovery.gram import bytes_needed
from fxfusion.recovery.memory import free_memory, limit_or_half, parts_of

CPU = torch.device("cpu")


def test_half_of_what_is_free() -> None:
    free = free_memory(CPU)
    assert 2**20 < free < 2**50
    assert abs(limit_or_half(None, CPU) - free // 2) < free // 4
    assert limit_or_half(1000, CPU) == 1000


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "1G"])
def test_what_is_no_number_of_bytes_is_refused(given: object) -> None:
    with pytest.raises(OptionError, match="memory_limit: expected bytes"):
        limit_or_half(given, CPU)  # type: ignore[arg-type]


def test_a_container_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, now = tmp_path / "max", tmp_path / "current"
    most.write_text("3000\n")
    now.write_text("1000\n")
    monkeypatch.setattr(memory, "_GROUPS", ((most, now),))
    assert free_memory(CPU) == 2000
    most.write_text("max\n")
    assert free_memory(CPU) > 2000


def test_as_few_parts_as_fit() -> None:
    assert parts_of(100, 10, 5, bytes_needed(100, 10, 5), "it") == [slice(0, 100)]
    three = parts_of(100, 10, 5, bytes_needed(34, 10, 5), "it")
    assert three == [slice(0, 34), slice(34, 68), slice(68, 100)]


def test_what_cannot_fit_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="memory_limit: layer 4 takes at least"):
        parts_of(100, 10, 5, 1000, "layer 4")
