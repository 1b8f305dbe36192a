from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxfusion.analysis import score_cache
from fxfusion.analysis.score_cache import Address, ScoreCache
from fxfusion.errors import OptionError

ADDRESSES: list[Address] = [
    ("loss", (), None),
    ("loss", (3,), None),
    ("kl", (3,), None),
    ("cosine", (), 3),
    ("cosine", (3,), 5),
    ("cosine", (5,), 3),
]


def opened(path: Path | None, batches: list[str] | None = None, model: str = "m") -> ScoreCache:
    cache = ScoreCache(path)
    cache.open(lambda: model, batches if batches is not None else ["a", "b"])
    return cache


def test_sums_are_found_where_they_were_put(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with opened(path) as cache:
        for number, address in enumerate(ADDRESSES):
            assert cache.get(address, 1) is None
            cache.put(address, 1, [float(number), 0.1])
            assert cache.get(address, 0) is None
    again = opened(path)
    for number, address in enumerate(ADDRESSES):
        assert again.get(address, 1) == [number, 0.1] and again.get(address, 2) is None


def test_the_order_of_dropping_does_not_matter() -> None:
    cache = opened(None)
    cache.put(("loss", (5, 2), None), 0, [1.0])
    assert cache.get(("loss", (2, 5), None), 0) == [1.0]


def test_what_was_put_is_written_when_an_interruption_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with pytest.raises(KeyboardInterrupt), opened(path) as cache:
        cache.put(ADDRESSES[0], 0, [1.0])  # the first put is written at once
        cache.put(ADDRESSES[1], 0, [2.0])
        assert opened(path).get(ADDRESSES[0], 0) == [1.0]
        raise KeyboardInterrupt
    assert opened(path).get(ADDRESSES[1], 0) == [2.0]


@pytest.mark.parametrize(("seconds", "sizes"), [(0.0, [1, 1, 3, 3, 5]), (0.1, [1, 1, 1, 4, 4])])
def test_the_file_is_written_once_a_second_or_less_often_if_that_takes_long(
    seconds: float, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 10.0
    monkeypatch.setattr("fxfusion.analysis.score_cache.time.monotonic", lambda: now)
    write = score_cache.write_json

    def slowly(path: Path, data: dict[str, object]) -> None:
        nonlocal now
        write(path, data)
        now += seconds

    monkeypatch.setattr(score_cache, "write_json", slowly)
    path = tmp_path / "cache.json"
    cache = opened(path)
    found = []
    for batch, moment in enumerate((10.0, 10.9, 11.5, 12.4, 12.6)):
        now = moment
        cache.put(ADDRESSES[0], batch, [float(batch)])
        found.append(len(json.loads(path.read_text())["values"]["loss"]))
    assert found == sizes


def test_text_may_be_added_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with opened(path, ["a", "b", "c"]) as cache:
        cache.put(ADDRESSES[0], 2, [3.0])
    with opened(path, ["a"]) as cache:
        cache.put(ADDRESSES[0], 0, [1.0])
    assert json.loads(path.read_text())["batches"] == ["a", "b", "c"]
    with opened(path, ["a", "b", "c", "d"]) as cache:
        assert cache.get(ADDRESSES[0], 2) == [3.0] and cache.get(ADDRESSES[0], 0) == [1.0]
        cache.put(ADDRESSES[0], 3, [4.0])
    assert json.loads(path.read_text())["batches"] == ["a", "b", "c", "d"]


def test_nothing_measured_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with opened(path):
        pass
    assert not path.exists()


def test_without_a_file_the_model_is_not_read() -> None:
    def never() -> str:
        raise AssertionError("the digest of the model costs a pass over its weights")

    cache = ScoreCache(None)
    cache.open(never, ["a"])
    with cache:
        cache.put(ADDRESSES[0], 0, [1.0])
    assert cache.get(ADDRESSES[0], 0) == [1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format is 2, here it is 1"),
        ({"model": "x"}, "model is x, here it is m"),
        ({"batches": ["a", "x"]}, "batch 1 differs"),
        ({"values": 3}, "is no cache of attention scores"),
        ({"values": {"loss": 3}}, "is no cache of attention scores"),
        ({"batches": None}, "is no cache of attention scores"),
    ],
    ids=str,
)
def test_a_file_with_something_else_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with opened(path) as cache:
        cache.put(ADDRESSES[0], 0, [1.0])
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(OptionError, match=message):
        opened(path)
