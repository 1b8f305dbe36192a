"""docs/performance.md says what the recorded files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import performance_page
from bench.performance_plots import figures
from bench.record import RESULTS, Record

RENEW = "python -m bench.performance_page"


def test_the_page_is_what_the_files_make_of_it() -> None:
    assert (performance_page.DOCS / "performance.md").read_text("utf-8") == performance_page.page(), RENEW


def test_its_figures_are_there(tmp_path: Path) -> None:
    names = {path.name for path in figures(tmp_path)}
    text = performance_page.page()
    assert all(f"figures/{name}" in text and (performance_page.DOCS / "figures" / name).exists() for name in names)


def test_another_number_makes_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    before = performance_page.page()
    read = Record.read

    def other(name: str | Path) -> Record:
        found = read(name)
        if name != "scale":
            return found
        changed = found.measurements[0].model_copy(update={"facts": {**found.measurements[0].facts, "nodes": 1}})
        return found.model_copy(update={"measurements": (changed, *found.measurements[1:])})

    monkeypatch.setattr(Record, "read", staticmethod(other))
    assert performance_page.page() != before


def test_without_a_gpu_run_the_page_says_so() -> None:
    words = "Nothing on this page was measured on a GPU"
    assert (words in performance_page.page()) is not (RESULTS / "gpu.json").exists()
