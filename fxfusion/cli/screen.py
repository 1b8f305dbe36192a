"""What commands print: numbered steps, short sentences and tables; plain text where there is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_COLUMNS = 100


class Screen:
    """A thin layer over rich. With `quiet`, prints nothing.

    `notes_on_stderr`: what is said while something slow runs goes there, also with `quiet`, so that stdout holds
    results alone.
    """

    def __init__(self, quiet: bool = False, notes_on_stderr: bool = False) -> None:
        self.console = _console(quiet)
        self.notes = _console(stderr=True) if notes_on_stderr else self.console

    def step(self, number: int, title: str, text: str) -> None:
        """The heading of a step and what it is about."""
        self.console.print(f"\n[bold cyan]{number}. {title}[/]")
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """What is no result: it goes where notes go."""
        self.notes.print(text, style="dim", markup=False, soft_wrap=True)

    def verdict(self, good: bool, text: str) -> None:
        """A green or red line."""
        self.line(f"{'PASS' if good else 'FAIL'}  {text}", "green" if good else "bold red")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], bars: bool = False) -> None:
        """The first column holds names, the others numbers; with `bars` the last one holds bars."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
        for index, name in enumerate(header):
            is_text = index == 0 or (bars and index == len(header) - 1)
            table.add_column(name, justify="left" if is_text else "right")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """A spinner while something slow runs; a line of text where there is no terminal."""
        if self.notes.is_terminal:
            return self.notes.status(text)
        self.notes.print(f"({text} ...)", style="dim", markup=False, soft_wrap=True)
        return nullcontext()


def _console(quiet: bool = False, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(quiet=quiet, stderr=stderr, highlight=False)
    if console.is_terminal:
        return console
    return Console(quiet=quiet, stderr=stderr, highlight=False, width=_PLAIN_COLUMNS)
