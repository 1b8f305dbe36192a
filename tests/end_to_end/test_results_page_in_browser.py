"""The page of results in a real Chromium: it asks for nothing, complains of nothing, shows the right numbers, fits.

Without a Chromium on PATH these tests are skipped, or fail where FXFUSION_REQUIRE_CHROMIUM=1 (as in CI).
Screenshots stay in artifacts/results_page/.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import pytest
from playwright.sync_api import Browser

from fxfusion.report.charts.figure import COLOURS
from fxfusion.report.results import Interval
from fxfusion.report.results_page import write_results_page
from tests.end_to_end.browser import NAMES, Visit, chromium, find, visit
from tests.fxfusion.report.results_samples import UNMEASURED, almost_empty, everything, large

pytestmark = pytest.mark.slow

ARTEFACTS = Path(__file__).resolve().parents[2] / "artifacts" / "results_page"
SAMPLES = {"everything": everything, "large": large, "almost_empty": almost_empty}
SCREENS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"dark": True},
    "phone": {"width": 390, "height": 844},
    "narrow": {"width": 700},
}

BLANK = tuple(int(COLOURS["line"][0][at : at + 2], 16) / 255 for at in (1, 3, 5))
CELLS, LAYERS = ".chart.cells .area", "#layers + .card .chart.map .area"

# Pieces of text that lie on each other, as pairs. Text that a scroll container or a label cuts off counts as far as
# it is seen. Boxes of text are taller than its letters, so a quarter of the height may overlap.
OVERLAPS = """(() => {
  const boxes = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange();
    if (!node.data.trim() || !node.parentElement.checkVisibility({ visibilityProperty: true })) continue;
    range.selectNodeContents(node);
    for (const { left, top, right, bottom } of range.getClientRects()) {
      const slack = (bottom - top) / 4;
      const box = { node, left: left + 1, top: top + slack, right: right - 1, bottom: bottom - slack };
      for (let up = node.parentElement; up; up = up.parentElement) {
        if (getComputedStyle(up).overflowX === "visible") continue;
        const seen = up.getBoundingClientRect();
        box.left = Math.max(box.left, seen.left); box.right = Math.min(box.right, seen.right);
        box.top = Math.max(box.top, seen.top); box.bottom = Math.min(box.bottom, seen.bottom);
      }
      if (box.right > box.left && box.bottom > box.top) boxes.push(box);
    }
  }
  boxes.sort((one, two) => one.top - two.top);
  const found = [];
  boxes.forEach((one, index) => {
    for (const two of boxes.slice(index + 1)) {
      if (two.top >= one.bottom) break;
      const apart = one.node === two.node || one.left >= two.right || two.left >= one.right;
      if (!apart) found.push([one.node.data.trim(), two.node.data.trim()]);
    }
  });
  return found;
})()"""

# What is wider than the window, outside of what scrolls by itself.
TOO_WIDE = "Math.max(0, document.documentElement.scrollWidth - innerWidth)"
# Labels of which the end is cut off.
CUT_OFF = """[...document.querySelectorAll(".tile b, .tile span, nav a, th")]
  .filter(one => one.checkVisibility() && getComputedStyle(one).display !== "inline")
  .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)"""
# Text and points of a chart outside of it.
OUTSIDE = """[...document.querySelectorAll(".chart :is(text, .spot)")].filter(one => {
  const box = one.getBoundingClientRect(), { left, right, top, bottom } = one.closest(".chart").getBoundingClientRect();
  const beside = box.left < left - 1 || box.right > right + 1;
  return one.checkVisibility() && (beside || box.top < top - 1 || box.bottom > bottom + 1);
}).map(one => one.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find()
    if executable is None:
        reason = f"no browser on PATH (looked for {', '.join(NAMES)}); on Debian: apt-get install chromium"
        if os.environ.get("FXFUSION_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"FXFUSION_REQUIRE_CHROMIUM=1, but there is {reason}")
        pytest.skip(reason)
    with chromium(executable) as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_results_page(make(), folder / f"{name}.html") for name, make in SAMPLES.items()}


def table(page: Visit, selector: str) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns, as they are shown."""
    script = """(table => {
      const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim());
      return [...table.tBodies[0].rows].map(row =>
        Object.fromEntries([...row.cells].map((cell, at) => [heads[at], cell.textContent.trim()])));
    })"""
    found: list[dict[str, str]] = page.run(f"{script}(document.querySelector({json.dumps(selector)}))")
    return found


def after(anchor: str) -> str:
    """The first table below a heading."""
    return f"#{anchor} ~ .card table"


def shown(found: Interval | None, places: int, factor: float = 1.0) -> str:
    assert found is not None and found.value is not None and found.low is not None and found.high is not None
    value, low, high = (f"{number * factor:,.{places}f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def tip(page: Visit) -> str:
    """What the tooltip says, "" while it is hidden."""
    found: str = page.run("(tip => tip.hidden ? '' : tip.textContent)(document.getElementById('tip'))")
    return found


def cell_centre(page: Visit, row: int, column: int, count: int) -> tuple[float, float]:
    box = page.box(CELLS)
    step_x, step_y = box["width"] / count, box["height"] / count
    return box["x"] + (column + 0.5) * step_x, box["y"] + (row + 0.5) * step_y


def distance(text: str) -> float:
    found = re.search(r"cosine distance: (\S+)", text)
    assert found, text
    return float(found[1])


# --- it asks for nothing, complains of nothing, and fits ---------------------------------------------------


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_page_loads_alone_and_everything_has_its_place(
    browser: Browser, files: dict[str, Path], sample: str, screen: str
) -> None:
    page = visit(browser, files[sample], **SCREENS[screen])
    page.screenshot(ARTEFACTS / f"{sample}-{screen}.png")
    assert page.problems == []
    assert page.requests == [files[sample].as_uri()]
    assert page.run(TOO_WIDE) == 0
    assert page.run(OVERLAPS) == []
    assert page.run(CUT_OFF) == []
    assert page.run(OUTSIDE) == []
    assert 500 < page.run("document.documentElement.scrollHeight") < 20_000


@pytest.mark.parametrize("screen", ["light", "phone"])
def test_the_page_of_a_compile_loads_alone_and_fits(browser: Browser, tmp_path: Path, screen: str) -> None:
    report = everything().report
    assert report is not None
    file = report.to_html(tmp_path / "report.html")
    page = visit(browser, file, **SCREENS[screen])
    page.screenshot(ARTEFACTS / f"compile-{screen}.png")
    assert (page.problems, page.requests) == ([], [file.as_uri()])
    assert (page.run(TOO_WIDE), page.run(OVERLAPS)) == (0, [])


def test_what_is_wrong_with_a_page_is_found(browser: Browser, files: dict[str, Path], tmp_path: Path) -> None:
    """The control of the test above: the same page, with one thing of each kind put in."""
    wrong = """<script>console.error("one"); console.warn("two"); throw new Error("three")</script>
    <div style="width: 5000px">wide</div>
    <svg viewBox="0 0 90 20" width="90"><text y="15">first label</text><text x="3" y="15">second label</text></svg>
    <div class="tile"><b style="display: block; width: 9px; white-space: nowrap">cut off</b></div>
    <div class="chart"><svg viewBox="0 0 90 20"><text x="-30" y="15">out</text></svg></div></main>"""
    file = tmp_path / "wrong.html"
    file.write_text(files["almost_empty"].read_text().replace("</main>", wrong))
    page = visit(browser, file)
    assert [line.splitlines()[0] for line in page.problems] == ["one", "two", "Error: three"]
    assert page.run(TOO_WIDE) > 3000
    assert ["first label", "second label"] in page.run(OVERLAPS)
    assert "cut off" in page.run(CUT_OFF)
    assert "out" in page.run(OUTSIDE)


def test_a_request_is_found_and_the_policy_of_the_page_stops_it(
    browser: Browser, files: dict[str, Path], tmp_path: Path
) -> None:
    address = "http://127.0.0.1:9/picture.png"  # nobody listens there
    text = files["almost_empty"].read_text().replace("</main>", f'<img src="{address}"></main>')
    kept, open_ = tmp_path / "kept.html", tmp_path / "open.html"
    kept.write_text(text)
    open_.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text))
    page = visit(browser, open_)
    assert page.requests == [open_.as_uri(), address]
    assert any("ERR_CONNECTION_REFUSED" in line or "ERR_UNSAFE_PORT" in line for line in page.problems)
    page = visit(browser, kept)
    assert any("Content Security Policy" in line for line in page.problems)


# --- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["everything", "large"])
def test_the_tables_hold_the_numbers(browser: Browser, files: dict[str, Path], sample: str) -> None:
    page, results = visit(browser, files[sample]), SAMPLES[sample]()
    layers = table(page, after("layers"))
    assert [(row["layer"], row["attention"], row["FFN width"]) for row in layers] == [
        (str(layer.number), layer.mixer, f"{layer.width:,}") for layer in results.layers
    ]
    assert [row["attention score"] for row in layers] == [shown(layer.score, 4) for layer in results.layers]
    assert [row["cos(X, f(X))"] for row in layers] == [f"{layer.cosine:.4f}" for layer in results.layers]
    assert [row["‖h‖ / ‖X‖"] for row in layers] == [f"{layer.ratio:.4f}" for layer in results.layers]
    groups = ["" if layer.group is None else str(layer.group) for layer in results.layers]
    assert [row["group"] for row in layers] == groups

    quality = table(page, after("quality"))
    assert [row["variant"] for row in quality] == [row.name for row in results.quality]
    for head, places, factor, field in (
        ("loss", 3, 1, "loss"),
        ("perplexity", 2, 1, "perplexity"),
        ("KL", 4, 1, "kl"),
        ("top 1 agrees, %", 1, 100, "top1"),
        ("top 5 agrees, %", 1, 100, "top5"),
    ):
        expected = [shown(getattr(row, field), places, factor) for row in results.quality]
        assert [re.sub(r"\s+", " ", row[head]) for row in quality] == expected

    speed = table(page, after("speed"))
    assert [(row["what"], row["times faster"], row["control"]) for row in speed] == [
        (row.name, shown(row.ratio, 3), shown(row.control, 3)) for row in results.speed
    ]
    sweep = table(page, after("sweep"))
    assert [(row["plan"], row["depth"], row["perplexity"], row["on the front"]) for row in sweep] == [
        (point.label, str(point.depth), shown(point.perplexity, 2), "yes" if point.front else "no")
        for point in results.sweep
    ]
    assert {row["on the front"] for row in sweep} == {"yes", "no"}


@pytest.mark.parametrize("sample", ["everything", "large"])
def test_the_values_of_the_matrix_stand_in_its_table(browser: Browser, files: dict[str, Path], sample: str) -> None:
    page, matrix = visit(browser, files[sample]), SAMPLES[sample]().matrix
    assert matrix is not None
    cells = page.run(
        "[...document.querySelector('.values').tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))"
    )
    count = len(matrix.layers)
    assert [row[0] for row in cells] == [str(layer) for layer in matrix.layers]
    for row in range(count):
        assert cells[row][1 : row + 2] == [""] * (row + 1)
        found, expected = cells[row][row + 2 :], matrix.values[row][row + 1 :]
        if None in expected:
            assert set(found) == {"?"}
        else:
            assert [float(text) for text in found] == pytest.approx(expected, rel=6e-3)


# --- pointer and keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["everything", "large"])
def test_the_pointer_on_a_cell_shows_its_value(browser: Browser, files: dict[str, Path], sample: str) -> None:
    page, matrix = visit(browser, files[sample]), SAMPLES[sample]().matrix
    assert matrix is not None
    count = len(matrix.layers)
    assert tip(page) == ""
    for row, column in ((0, 1), (2, 7), (5, count - 1), (count - 2, count - 1)):
        page.move(*cell_centre(page, row, column, count))
        assert f"removed: layer {row}\nmeasured: layer {column}\n" in tip(page)
        assert distance(tip(page)) == pytest.approx(matrix.values[row][column], rel=5e-4)
    page.move(*cell_centre(page, 7, 2, count))
    assert "an earlier layer" in tip(page)
    page.move(1, 1)
    assert tip(page) == ""


def test_a_cell_that_is_not_measured_says_so(browser: Browser, files: dict[str, Path]) -> None:
    page = visit(browser, files["large"])
    page.move(*cell_centre(page, UNMEASURED, 90, 126))
    assert "not measured yet" in tip(page)
    assert f"rows {UNMEASURED}." in page.run("document.querySelector('.about .note').textContent")


def test_the_keys_reach_every_cell(browser: Browser, files: dict[str, Path]) -> None:
    page, matrix = visit(browser, files["everything"]), everything().matrix
    assert matrix is not None
    focus(page, ".chart.cells")
    assert "the same layer" in tip(page)
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.press(key)
    assert distance(tip(page)) == pytest.approx(matrix.values[1][3], rel=5e-4)
    page.press("End")
    assert distance(tip(page)) == pytest.approx(matrix.values[1][11], rel=5e-4)
    page.screenshot(ARTEFACTS / "everything-keys.png")
    inside = page.run(
        "(box => box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight)"
        "(document.getElementById('tip').getBoundingClientRect())"
    )
    assert inside
    page.press("Escape")
    assert tip(page) == ""


def focus(page: Visit, wanted: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(100):
        page.press("Tab")
        if page.run(f"document.activeElement.matches({wanted!r})"):
            return
    raise AssertionError(f"100 times Tab do not lead to {wanted}")


def test_pointer_and_keys_tell_about_a_layer(browser: Browser, files: dict[str, Path]) -> None:
    page, layer = visit(browser, files["everything"]), everything().layers[5]
    box = page.box(LAYERS)
    page.move(box["x"] + 5.5 / 12 * box["width"], box["y"] + 40)
    pointed = tip(page)
    assert pointed.startswith("layer 5\nattention dropped\n") and f"FFN of width {layer.width:,}" in pointed
    assert shown(layer.score, 4) in pointed and "fused, group 0" in pointed and f"{layer.cosine:.4f}" in pointed
    page.move(1, 1)
    assert tip(page) == ""
    focus(page, ".chart.map")
    assert tip(page) == pointed
    for key, number in (("ArrowLeft", 4), ("End", 11), ("Home", 0), ("ArrowRight", 1)):
        page.press(key)
        assert tip(page).splitlines()[0] == f"layer {number}"


def test_a_point_of_the_sweep_tells_its_plan_and_leads_to_its_row(browser: Browser, files: dict[str, Path]) -> None:
    page, point = visit(browser, files["everything"]), everything().sweep[2]
    selector = ".chart a[href='#sweep-2']"
    box = page.box(selector)
    page.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip(page).startswith(point.label) and f"perplexity {shown(point.perplexity, 2)}" in tip(page)
    page.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.run("document.querySelector(':target').cells[0].textContent") == point.label


def test_a_click_on_a_head_sorts_by_number(browser: Browser, files: dict[str, Path]) -> None:
    page = visit(browser, files["everything"])
    page.run("document.querySelector('#layers ~ .card details').open = true")
    expected = sorted(everything().layers, key=lambda layer: layer.score.value if layer.score else 0)
    for order in (expected, expected[::-1]):
        page.page.locator("#layers ~ .card table").first.locator("th:nth-child(5) button").click()
        assert [row["layer"] for row in table(page, after("layers"))] == [str(layer.number) for layer in order]
    assert page.problems == []


@pytest.mark.parametrize("screen", ["light", "phone"])
@pytest.mark.parametrize("sample", ["everything", "large"])
def test_the_heat_map_is_square_and_has_the_colours_of_its_values(
    browser: Browser, files: dict[str, Path], sample: str, screen: str
) -> None:
    page, matrix = visit(browser, files[sample], **SCREENS[screen]), SAMPLES[sample]().matrix
    assert matrix is not None
    count, box = len(matrix.layers), page.box(CELLS)
    assert box["width"] == pytest.approx(box["height"], abs=1) and box["width"] > 220
    seen = matplotlib.image.imread(io.BytesIO(page.page.screenshot()))[..., :3]
    cells = [(row, column) for row in (0, 4, count // 2) for column in (1, count // 2 + 1, count - 1)]
    for row, column in cells:
        x, y = cell_centre(page, row, column, count)
        if x < seen.shape[1]:  # on a phone a part of a large matrix is to be scrolled to
            value = matrix.values[row][column]
            power = min(1.0, max(0.0, (math.log2(value or 1) + 9) / 8))
            expected = matplotlib.colormaps["viridis"](power)[:3] if column > row else BLANK
            assert seen[int(y), int(x)] == pytest.approx(expected, abs=0.02), (row, column)


def test_without_javascript_all_values_can_be_read(browser: Browser, files: dict[str, Path]) -> None:
    page, results = visit(browser, files["everything"], scripts=False), everything()
    page.screenshot(ARTEFACTS / "everything-no-javascript.png")
    assert page.run("document.querySelector('th button')") is None  # scripts are off indeed
    assert page.run("document.querySelectorAll('.cells svg image').length") == 2  # the cells and their scale
    titles = page.run(f"[...document.querySelectorAll('{LAYERS} title')].map(one => one.textContent)")
    assert [title.splitlines()[0] for title in titles] == [f"layer {layer.number}" for layer in results.layers]
    assert page.run("document.querySelectorAll('.values td').length") == 144
    assert page.run(TOO_WIDE) == 0 and page.run(OVERLAPS) == []
