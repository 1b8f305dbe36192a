"""The page of results as text: parts that are there, parts that are not, its size, and how it is written.

How it looks and behaves is tested in a browser: tests/end_to_end/test_results_page_in_browser.py.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from fxfusion.errors import FxFusionError
from fxfusion.files import RECORD
from fxfusion.report import results_page
from fxfusion.report.results import Model, PlanFacts, Results, Sample, SpeedRow
from fxfusion.report.results_page import MAX_BYTES, render, write_results_page
from tests.fxfusion.report.results_samples import almost_empty, everything, large
from tests.fxfusion.report.test_html import parsed

HEADINGS = (
    *(
        "layers",
        "dependency",
        "plan",
        "quality",
        "probes",
        "text",
        "speed",
        "sweep",
        "comparison",
        "compiler",
        "missing",
    ),
)
# Which field makes which section.
SECTIONS = {
    "layers": "layers",
    "matrix": "dependency",
    "plan": "plan",
    "quality": "quality",
    "probes": "probes",
    "samples": "text",
    "speed": "speed",
    "sweep": "sweep",
    "comparison": "comparison",
    "report": "compiler",
}


@cache
def whole() -> str:
    """The page of everything."""
    return render(everything())


def test_the_same_results_give_the_same_page() -> None:
    assert render(everything()) == whole()


def headings(text: str) -> list[str]:
    return [found for found in re.findall(r'<h2 id="(\w+)"', text) if found in HEADINGS]


@pytest.mark.parametrize("make", [everything, large, almost_empty, Results])
def test_the_page_is_well_formed_and_its_links_lead_somewhere(make: type[Results]) -> None:
    text = render(make())
    found = parsed(text)
    assert not found.wrong and not found.open
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)


def test_nothing_comes_from_outside_and_the_policy_says_so() -> None:
    text = whole()
    assert not re.search(r"https?://|url\((?!#)|@import|<link|<img|src=", text)
    assert "default-src 'none'; img-src data:; style-src" in text
    assert all(found.startswith("data:image/png") for found in re.findall(r'href="([^#"][^"]*)"', text))


def test_all_parts_are_there() -> None:
    assert headings(whole()) == list(HEADINGS[:-1])


@pytest.mark.parametrize(("field", "section"), SECTIONS.items())
def test_a_part_that_is_missing_is_named_with_its_command(field: str, section: str) -> None:
    empty = Results()
    text = render(dataclasses.replace(everything(), **{field: getattr(empty, field)}))
    assert headings(text) == [name for name in HEADINGS if name != section]
    (command,) = re.findall(r'<td class="mono">(fxfusion [^<]+)</td>', text)
    assert command.split()[1] in {"score", "matrix", "plan", "eval", "sweep", "compare"}


def test_layers_without_scores_name_the_command_that_scores() -> None:
    results = everything()
    layers = tuple(dataclasses.replace(layer, score=None) for layer in results.layers)
    text = render(dataclasses.replace(results, layers=layers))
    assert "<td>attention scores</td>" in text and "<td>attention scores</td>" not in whole()


def test_an_empty_page_names_everything() -> None:
    text = render(Results())
    assert headings(text) == ["missing"] and "<nav" not in text and 'class="tiles"' not in text
    assert len(re.findall(r'<td class="mono">fxfusion', text)) == len(SECTIONS)


@pytest.mark.parametrize(
    ("shown", "control"),
    [
        ("9.31 M", "9.31 B"),
        ("4 of 12", "5 of 12"),
        ("4 → 1", "4 → 2"),
        ("24 → 17", "24 → 16"),  # 12 attentions and 12 FFNs; 8 attentions, 8 FFNs and 1 wide one
        ("21.28 → 31.85", "21.28 → 31.86"),
        ("1.08x", "1.09x"),
        ("some/model · SomeForCausalLM · 12 layers · hidden 256 · vocabulary 4,096", "13 layers"),
    ],
)
def test_key_figures(shown: str, control: str) -> None:
    text = whole()
    assert shown in text and control not in text


def test_a_plan_without_groups_and_a_model_with_a_name_only() -> None:
    text = render(Results(model=Model(name="m"), plan=PlanFacts(dropped_attention=(3,))))
    assert "The plan fuses nothing." in text and '<p class="facts">m</p>' in text


def test_everything_is_escaped() -> None:
    hostile = "<b>bold</b>\"'onmouseover=</script>"
    results = dataclasses.replace(
        everything(),
        model=Model(name=hostile),
        notes=(hostile,),
        score_method=hostile,
        samples=(Sample(prompt=hostile, reference=hostile, text=hostile),),
        speed=(SpeedRow(name=hostile, ratio=everything().speed[0].ratio),),
        plan=PlanFacts(groups=((hostile, "b"),), norm=hostile, made_by=hostile, yaml=hostile),
    )
    text = render(results, title=hostile)
    assert "<b>bold" not in text and text.count("&lt;b&gt;bold") >= 10
    assert not re.search("<[^>]*\"'onmouseover", text) and text.count("</script>") == 2


# --- size and file -----------------------------------------------------------------------------------------


def test_126_layers_take_less_than_half_of_the_allowed_size() -> None:
    assert len(render(large()).encode()) < MAX_BYTES / 2


def test_a_page_that_is_too_large_leaves_out_tables_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    results = large()
    whole = len(render(results).encode())
    monkeypatch.setattr(results_page, "MAX_BYTES", whole - 1)
    shorter = render(results)
    assert 'class="values"' not in shorter and "Left out, to keep the page below 2 MB: the values of" in shorter
    assert "heat-data" in shorter and "compiler" in headings(shorter)
    monkeypatch.setattr(results_page, "MAX_BYTES", len(shorter.encode()) - 1)
    shortest = render(results)
    assert "what the compiler found" in shortest and "compiler" not in headings(shortest)
    monkeypatch.setattr(results_page, "MAX_BYTES", len(shortest.encode()) - 1)
    with pytest.raises(FxFusionError, match="fewer samples"):
        render(results)


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    path = write_results_page(almost_empty(), tmp_path / "r.html", title="my model")
    assert path == tmp_path / "r.html" and {*tmp_path.iterdir()} == {path, tmp_path / RECORD}
    text = path.read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>") and "<title>my model</title>" in text


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "r.html"
    write_results_page(almost_empty(), target)
    old = target.read_text()

    def full(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text.encode(encoding)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FxFusionError, match="r.html: cannot be written .*No space left"):
        write_results_page(almost_empty(), target)
    assert {*tmp_path.iterdir()} == {target, tmp_path / RECORD} and target.read_text() == old


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no").touch()
    with pytest.raises(FxFusionError, match="cannot be written"):
        write_results_page(Results(), tmp_path / "no" / "r.html")
