"""What the demo prints: numbered steps, short sentences and tables; plain text where there is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_PLAIN_COLUMNS = 100


class Screen:
    """A thin layer over rich. With `quiet`, prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(quiet=quiet, highlight=False)
        if not self.console.is_terminal:
            self.console = Console(quiet=quiet, highlight=False, width=_PLAIN_COLUMNS)

    def step(self, number: int, title: str, text: str) -> None:
        """The heading of a step and what it is about."""
        self.console.print(f"\n[bold cyan]{number}. {title}[/]")
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def verdict(self, good: bool, text: str) -> None:
        """A green or red line."""
        self.line(f"{'PASS' if good else 'FAIL'}  {text}", "green" if good else "bold red")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """The first column holds names, the others numbers."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.console.print(table)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """A spinner while something slow runs; a line of text where there is no terminal."""
        if self.console.is_terminal:
            return self.console.status(text)
        self.line(f"({text} ...)", "dim")
        return nullcontext()
