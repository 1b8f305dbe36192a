from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.analysis.heat_map import heat_map
from fxfusion.errors import OptionError

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
