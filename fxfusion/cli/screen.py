"""What commands print: numbered steps, short sentences and tables; plain text where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_COLUMNS = 100

Found = Mapping[str, Any]


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


# --- what was measured --------------------------------------------------------------------------------


def show_evaluation(result: Found, screen: Screen) -> None:
    """Every part of the result that is there."""
    show_quality(result["quality"], screen)
    for name, part in (("generation", _generation), ("probes", _probes), ("speed", show_speed), ("tasks", _tasks)):
        if name in result:
            part(result[name], screen)


def show_quality(found: Mapping[str, Found], screen: Screen) -> None:
    """Two tables, since the intervals take room: what it predicts, and how far that is from the reference."""
    losses = [
        (name, number(one["perplexity"], 2), number(one["loss"], 3), number(one["loss_increase"], 3, signed=True))
        for name, one in found.items()
    ]
    screen.table(("", "perplexity", "loss [nats]", "increase"), losses)
    screen.line("")
    distances = [
        (name, number(one["kl"], 4), number(one["top1"], 1, 100), number(one["top5"], 1, 100))
        for name, one in found.items()
    ]
    screen.table(("against the first row", "KL [nats]", "top 1 agrees [%]", "top 5 agrees [%]"), distances)
    control = next(iter(found.values()))
    exact = control["kl"]["value"] == 0 and control["top1"]["value"] == 1
    screen.line("In brackets: 95 % intervals. The first row is the model against itself, as control.", "dim")
    if not exact:
        screen.line("The control is not zero: differences of that size are rounding, and mean nothing.", "bold red")


def _generation(found: Found, screen: Screen) -> None:
    count, length = found["prompts"], found["max_new_tokens"]
    text = f"{number(found['length'], 1)} of {length} tokens are the reference's, mean of {count} prompts;"
    screen.line(f"\nGreedy text: {text} {number(found['equal'], 0, 100)} % of the texts are equal")
    for sample in found["samples"][:1]:
        for name in ("prompt", "reference", "model"):
            written = sample.get(f"{name}_text")
            screen.line(f"{name + ':':<11}{sample[name] if written is None else repr(written)}", "dim")


def _probes(found: Mapping[str, Found], screen: Screen) -> None:
    kinds = list(next(iter(found.values()))["kept"])
    rows = [
        (name, *("-" if one["kept"][kind] is None else f"{one['kept'][kind]:.0%}" for kind in kinds))
        for name, one in found.items()
    ]
    screen.line("")
    screen.table(("probes solved, of those that the first row solves", *kinds), rows)


def show_speed(found: Mapping[str, Found], screen: Screen) -> None:
    """How many times faster the fused model is than each of the others."""
    against = list(next(iter(found.values()))["fused_against"])
    rows = [
        (
            name,
            *(number(one["fused_against"][other], 3) for other in against),
            number(one["control"], 3),
            f"{one['seconds']['fused'] * 1e3:.2f}",
        )
        for name, one in found.items()
    ]
    screen.line("")
    screen.table(("times faster than", *against, "control", "fused [ms]"), rows)


def _tasks(found: Mapping[str, Found], screen: Screen) -> None:
    rows = [
        (f"{task} {metric}", name, number(value, 4))
        for name, scores in found.items()
        for task, score in scores.items()
        for metric, value in score["metrics"].items()
    ]
    screen.line("")
    screen.table(("task", "model", "score"), sorted(rows))


def number(found: Mapping[str, float | None], places: int, factor: float = 1.0, signed: bool = False) -> str:
    """`1.23 [1.20, 1.26]`"""
    sign = "+" if signed else ""

    def one(part: str) -> str:
        value = found[part]
        return "?" if value is None else f"{value * factor:{sign}.{places}f}"

    return f"{one('value')} [{one('low')}, {one('high')}]"
