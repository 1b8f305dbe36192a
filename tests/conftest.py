"""Options and fixtures of the whole test suite."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fxfusion.backend import forget_reports

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ instead of comparing with it")


@pytest.fixture(autouse=True)
def own_reports() -> None:
    """Each test sees only the reports of its own compiles (the backend keeps the last 64)."""
    forget_reports()


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
