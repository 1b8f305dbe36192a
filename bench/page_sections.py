"""A page that several benchmarks write, each its own section, so that one can be remade without the others."""

from __future__ import annotations

from pathlib import Path


def put_section(page: Path, name: str, text: str) -> Path:
    """Replace a section of the page, or add it at the end; what other benchmarks wrote stays."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->\n"
    before = page.read_text("utf-8") if page.exists() else ""
    block = begin + text.strip() + end
    if begin in before and end in before:
        head, _, rest = before.partition(begin)
        content = head + block + rest.partition(end)[2]
    else:
        content = f"{before.rstrip()}\n\n{block}".lstrip()
    page.write_text(content, encoding="utf-8")
    return page
