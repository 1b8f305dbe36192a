"""page_sections: one section is replaced, the others stay."""

from __future__ import annotations

from pathlib import Path

from bench.page_sections import put_section


def test_sections_are_added_and_replaced_alone(tmp_path: Path) -> None:
    page = put_section(tmp_path / "page.md", "one", "# One\nfirst\n")
    put_section(page, "two", "## Two")
    assert (
        page.read_text()
        == "<!-- one -->\n# One\nfirst\n<!-- end of one -->\n\n<!-- two -->\n## Two\n<!-- end of two -->\n"
    )
    put_section(page, "one", "# One\nsecond")
    assert "second" in page.read_text() and "first" not in page.read_text() and page.read_text().count("## Two") == 1
    once = page.read_text()
    put_section(page, "one", "# One\nsecond")
    assert page.read_text() == once
