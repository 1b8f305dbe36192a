"""Options and fixtures of the whole test suite, and which tests are slow.

`tests/seconds.json` holds the processor time of each test that took over half a second when it was recorded
(`make seconds`). What takes over `SLOW` seconds is marked slow; the quickest test of each file stays fast.
"""

from __future__ import annotations

import gc
import json
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fxfusion.backend import forget_reports

GOLDEN = Path(__file__).parent / "golden"
SECONDS = Path(__file__).parent / "seconds.json"
SLOW = 1.0
_spent: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ instead of comparing with it")
    parser.addoption("--record-seconds", action="store_true", help=f"write {SECONDS.name}: which tests are slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what took over `SLOW` seconds of processor time, but for the quickest test of a file."""
    seconds: dict[str, float] = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}
    by_file: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_file[item.nodeid.partition("::")[0]].append(item)
    for tests in by_file.values():
        fast = [
            test for test in tests if not any(map(test.get_closest_marker, ("slow", "gpu", "engines", "engines_full")))
        ]
        fast.sort(key=lambda test: seconds.get(test.nodeid, 0.0))
        for test in fast[1:]:
            if seconds.get(test.nodeid, 0.0) > SLOW:
                test.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[_START] = _processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    start, item.stash[_START] = item.stash[_START], _processor_seconds()
    report.processor_seconds = item.stash[_START] - start
    return report


def pytest_runtest_logreport(report: Any) -> None:
    _spent[report.nodeid] += report.processor_seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What ran is recorded anew; what did not keeps its record where the test still exists."""
    if not session.config.getoption("--record-seconds") or hasattr(session.config, "workerinput"):
        return
    known: dict[str, float] = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}
    root = Path(session.config.rootpath)
    known = {name: spent for name, spent in known.items() if (root / name.partition("::")[0]).exists()}
    known |= _spent
    found = {name: round(spent, 2) for name, spent in sorted(known.items()) if spent > SLOW / 2}
    SECONDS.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


_START = pytest.StashKey[float]()


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.fixture(autouse=True)
def own_reports() -> None:
    """Each test sees only the reports of its own compiles (the backend keeps the last 64)."""
    forget_reports()


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a library sets in a test (peft's BOFT leaves CXX=gcc behind, which cannot link C++) ends with the test."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def clean_dynamo() -> Iterator[None]:
    """Nothing compiled before counts, and nothing compiled here is left: no graph, and no packed weights."""
    torch._dynamo.reset()
    gc.collect()
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares with `tests/golden/<name>.txt`, or writes it with --update-golden."""
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        assert file.exists(), f"no {file.name}; run pytest with --update-golden and read what it writes"
        assert text == file.read_text(encoding="utf-8"), f"{file.name} differs; if that is right, --update-golden"

    return check
