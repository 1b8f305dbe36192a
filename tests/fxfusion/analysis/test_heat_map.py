from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.analysis.heat_map import for_page, heat_map
from fxfusion.errors import OptionError
from fxfusion.report.charts.figure import style
from fxfusion.report.charts.heat_map import draw

SVG = "{http://www.w3.org/2000/svg}"


def matrix(values: Tensor, attention: tuple[int, ...] | None = None) -> DependencyMatrix:
    count = len(values)
    layers = tuple(range(10, 10 + count))
    one = torch.ones(count)
    return DependencyMatrix(
        values=values.triu(1),
        layers=layers,
        names=tuple(map(str, layers)),
        unit="ffn",
        cosine=one,
        ratio=one,
        contribution_cosine=one,
        attention=layers if attention is None else attention,
        dropped_attention=(),
        tokens=1,
        sequences=1,
    )


def random(count: int) -> Tensor:
    return torch.rand(count, count, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.01


def texts(path: Path) -> list[str]:
    """All text of an SVG; the glyphs are drawn, their words stand in comments."""
    content = path.read_text(encoding="utf-8")
    ET.fromstring(content)  # well-formed
    return [part.split("-->")[0].strip() for part in content.split("<!--")[1:]]


def picture(path: Path) -> Tensor:
    """`[rows, columns, 4]` in 0 to 1."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(path).copy())


def cells(path: Path, shown: DependencyMatrix) -> Tensor:
    """The colour at the middle of each cell of a picture, `[count, count, 3]`."""
    found = for_page(shown)
    with style():
        figure = draw(found, dropped=found.dropped, title="How much")
        figure.draw_without_rendering()
    image, box = picture(path), figure.axes[0].bbox
    scale, count = len(image) / float(figure.bbox.height), len(found.layers)
    middles = (torch.arange(count) + 0.5) / count
    rows = (figure.bbox.height - box.y1 + middles * box.height) * scale
    columns = (box.x0 + middles * box.width) * scale
    return image[rows.long()[:, None], columns.long()[None, :], :3]


def test_colours_follow_the_logarithm_from_dark_to_light(tmp_path: Path) -> None:
    values = torch.zeros(6, 6)
    values[0] = torch.tensor([0, 2.0**-12, 2.0**-9, 2.0**-5, 2.0**-1, 0.9])
    colours = cells(heat_map(matrix(values), tmp_path / "map.png"), matrix(values))
    below, low, middle, high, above = colours[0, 1:]
    assert torch.equal(below, low) and torch.equal(high, above)  # beyond the scale: the end's colour
    assert float(low.mean()) + 0.1 < float(middle.mean()) < float(high.mean()) - 0.1
    grey = colours[3, 1]
    assert float(grey.max() - grey.min()) < 0.05 < float(low.max() - low.min())
    assert torch.equal(colours[2, 2], grey) and torch.equal(colours[1, 4], low)  # exactly 0, above the diagonal


def test_all_words_and_numbers_are_there(tmp_path: Path) -> None:
    path = heat_map(matrix(random(12)), tmp_path / "map.svg")
    found = texts(path)
    assert {str(layer) for layer in range(10, 22)} <= set(found)
    assert {"0.002 or less", "0.031", "0.5 or more"} <= set(found)
    for words in ("FFN that is removed (layer)", "FFN whose contribution is measured (layer)"):
        assert words in found
    assert "How much each FFN depends on each earlier one" in found
    assert "cosine distance (low: independent)" in found
    assert "layer without attention" not in found
    block = dataclasses.replace(matrix(random(3)), unit="block")
    named = texts(heat_map(block, tmp_path / "block.svg", title="My model"))
    assert "My model" in named and "layer that is removed" in named
    assert "How much each block depends on each earlier one" not in named


def test_layers_without_attention_are_marked(tmp_path: Path) -> None:
    marked = matrix(random(6), attention=(10, 11, 15))
    assert "layer without attention" in texts(heat_map(marked, tmp_path / "map.svg"))
    colours = cells(heat_map(marked, tmp_path / "map.png"), marked)
    plain = cells(heat_map(matrix(random(6)), tmp_path / "plain.png"), matrix(random(6)))
    differs = [bool((colours[place, place] - plain[place, place]).abs().max() > 0.2) for place in range(6)]
    assert differs == [False, False, True, True, True, False]


def test_a_deep_model_shows_some_of_its_layer_numbers(tmp_path: Path) -> None:
    found = texts(heat_map(matrix(random(128)), tmp_path / "map.svg"))
    numbers = [int(text) for text in found if text.isdigit()]
    columns, rows = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    assert columns == rows == list(range(10, 138, 10))
    image = picture(heat_map(matrix(random(128)), tmp_path / "map.png"))
    assert image.shape[0] > 128 * 8  # several points a cell


def test_the_same_matrix_gives_the_same_file(tmp_path: Path) -> None:
    for suffix in ("png", "svg", "SVG"):
        one, other = (heat_map(matrix(random(4)), tmp_path / f"{name}.{suffix}") for name in "ab")
        assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    different = heat_map(matrix(random(4) * 2), tmp_path / "c.png")
    assert different.read_bytes() != (tmp_path / "a.png").read_bytes()


def test_one_layer_can_be_drawn(tmp_path: Path) -> None:
    assert heat_map(matrix(torch.zeros(1, 1)), str(tmp_path / "new" / "map.png")).stat().st_size > 1000


@pytest.mark.parametrize("name", ["map.pdf", "map", "map.jpg"])
def test_another_suffix_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"a heat map is a .png or .svg file, got '{name}'"):
        heat_map(matrix(random(2)), tmp_path / name)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        heat_map(matrix(random(2)), tmp_path / "file" / "map.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
