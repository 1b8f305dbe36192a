"""Results for `print`: a few lines or a short table, never the dump of a dataclass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

_MOST_ROWS = 40


def lines(rows: Iterable[tuple[str, object]], note: str = "") -> str:
    """Names and values in two columns, without those that are None; then a line on what they are of."""
    known = [(name, str(value)) for name, value in rows if value is not None]
    return "\n".join(filter(None, [tabulate(known, tablefmt="plain", disable_numparse=True), note]))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> str:
    """A table of at most 40 rows, the others counted; then a line on what it is of."""
    shown = [[str(cell) for cell in row] for row in rows[:_MOST_ROWS]]
    more = f"... and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    found = tabulate(shown, header, tablefmt="simple", disable_numparse=True)
    return "\n".join(filter(None, [found, more, note]))
