"""docs/performance.md and docs/results.md say what the recorded files say."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench import choosing, gpu, recovery, recovery_training, roads
from bench.performance_page import figures, page
from bench.record import Measurement, Record
from bench.show import DOCS

RENEW = "python -m bench.performance_page"


def test_the_page_is_what_the_files_make_of_it() -> None:
    assert (DOCS / "performance.md").read_text("utf-8") == page(), RENEW
    assert (DOCS / "gpu_predictions.md").read_text("utf-8") == gpu.page(), RENEW


def test_its_figures_are_there(tmp_path: Path) -> None:
    names = {path.name for path in figures(tmp_path)}
    text = page()
    assert all(f"figures/{name}" in text and (DOCS / "figures" / name).exists() for name in names)


def test_another_number_makes_another_page() -> None:
    record = Record.read("scale")
    changed = record.measurements[0].model_copy(update={"facts": {**record.measurements[0].facts, "nodes": 1}})
    other = record.model_copy(update={"measurements": (changed, *record.measurements[1:])})
    assert page({"scale": other}) != page({"scale": record})


def test_without_a_gpu_run_the_page_says_so() -> None:
    words = "Nothing on this page was measured on a GPU"
    assert words in page({})
    assert words not in page({"gpu": Record.of("gpu", measurements=(made_up("window_speed"),))})


def test_what_was_not_recorded_says_how_it_is_made() -> None:
    assert "## Norms on the FFN's output\n\nNot recorded yet: `python -m bench.chain_speed --norms`.\n" in page({})
    assert page({}).count("Not recorded yet") == 8


def made_up(name: str) -> Measurement:
    times = {"unfused": [3.0, 3.0], "members": [2.5, 2.5], "fused": [2.0, 2.0], "unfused_again": [3.0, 3.0]}
    pairs = [("unfused", "fused"), ("members", "fused"), ("unfused", "unfused_again")]
    if name == "window_speed":
        times = {"intact": [3.0, 3.0], "hoist 2": [2.0, 2.0], "intact again": [3.0, 3.0]}
        pairs = [("intact", "hoist 2"), ("intact", "intact again")]
    return Measurement.of({"tokens": 1}, times, pairs)


def test_sentences_follow_from_the_numbers() -> None:
    names = ("window_speed", "grouped_speed")
    text = page({name: Record.of(name, measurements=(made_up(name),)) for name in names})
    assert "* intact / hoist 2: 1.50x over 1 cases, faster in 1, slower in 0, and neither in 0" in text
    assert "Over\n1 cells of a chain of 8 the fused one is 1.50x as fast" in text and "1.25x" in text and "A/A" in text


def test_results_are_what_the_files_make_of_them(tmp_path: Path) -> None:
    shutil.copy(DOCS / "results.md", tmp_path)
    choosing.write_page(Record.read("choosing").results, tmp_path)
    recovery.write_section(Record.read("recovery").results, Record.read("recovery").left_out, tmp_path)
    recovery_training.write_section(Record.read("recovery_training").results, tmp_path)
    roads.write_page(Record.read("roads").results, tmp_path)
    assert (tmp_path / "results.md").read_text("utf-8") == (DOCS / "results.md").read_text("utf-8"), "make results"
    assert all((DOCS / "figures" / path.name).exists() for path in (tmp_path / "figures").iterdir())
