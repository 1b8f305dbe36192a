from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxfusion.errors import FxFusionError
from fxfusion.models.traced import TracedModel
from fxfusion.planning import forecast
from fxfusion.planning.forecast import Room, lines_of, room_of, seconds_per_token, steps_of, told
from fxfusion.planning.request import Request
from tests.fxfusion.recovery.own_text import LENGTH, model_of, own_text


def request(**given: Any) -> Request:
    return Request.of({"preset": "automatic", "hardware": None, **given})


def test_one_block_is_timed_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one second at each look: start, block and end take one each, the four blocks four."""
    ticks = iter(range(1000))
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: float(next(ticks)))
    batch = own_text()[0]
    assert seconds_per_token(TracedModel(model_of()), batch) == pytest.approx((1 + 4 + 1) / (16 * LENGTH))


def test_what_is_timed_is_a_pass_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the blocks, one block and what stands after them are all that is computed."""
    computed: list[int] = []
    run = forecast.TracedModel.graph

    def watched(self: TracedModel, batch: torch.Tensor) -> Any:
        graph = run(self, batch)
        blocks = graph.blocks.layers
        assert [block.layer for block in blocks] == [0, 1, 2, 3]
        computed.append(len(blocks))
        return graph

    monkeypatch.setattr(forecast.TracedModel, "graph", watched)
    assert seconds_per_token(TracedModel(model_of()), own_text()[0]) > 0 and computed == [4]


def test_the_steps_count_passes() -> None:
    sizes: dict[str, Any] = {"layers": 30, "mixers": 30, "each": 0.001}
    quick = steps_of(
        request(roads=("hoist",), max_window=2, after_refit=False, target_depth=27), 1024, 14336, 2048, **sizes
    )
    assert len(quick) == 5
    assert "29 windows of layers alone, some 8 whole plans" in quick[0].what and "refit" not in quick[0].what
    assert quick[0].tokens == 1024 * (1 + forecast._WINDOW * 29 + 8) and quick[0].seconds == pytest.approx(
        quick[0].tokens * 0.001
    )
    thorough = steps_of(request(), 65536, 57344, 8192, **sizes)
    assert "after a refit" in thorough[0].what and thorough[0].tokens > 10 * quick[0].tokens
    assert [step.what.split()[0] for step in quick] == ["choose:", "refit", "measure", "time", "write"]


def test_what_is_said_before_it_starts() -> None:
    steps = steps_of(request(target_depth=3), 2048, 4096, 512, layers=4, mixers=4, each=0.01)
    said = lines_of(steps, Room(memory=3 * 10**9, disk=10**8))
    assert said[0].startswith("1. choose: ") and said[4].startswith("5. write") and "an estimate" in said[5]
    assert said[6] == "at most some 3.0 GB of memory and 0.1 GB of disk"
    assert [told(seconds) for seconds in (12, 89, 90, 720, 5400)] == ["12 s", "89 s", "2 min", "12 min", "1.5 h"]


def test_a_disk_without_room_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    weights = sum(value.nbytes for value in model.parameters())
    room = room_of(model, own_text()[0], 1000)
    assert room.disk == 1000 + weights and room.memory > 3 * weights
    room.check(tmp_path / "new" / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room.disk - 1))
    with pytest.raises(FxFusionError, match="GB are to be written"):
        room.check(tmp_path / "new" / "out")
