"""How docs/results.md writes numbers, layers and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

Row = Mapping[str, Any]


def value(row: Row) -> float:
    return float(row["loss_increase"]["value"])


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def cell(estimate: Mapping[str, float | None]) -> str:
    def shown(name: str) -> str:
        number = estimate[name]
        return "-" if number is None else f"{number:.2f}" if abs(number) >= 10 else f"{number:.3f}"

    return f"{shown('value')} [{shown('low')}, {shown('high')}]"


def fine_cell(estimate: Mapping[str, float | None]) -> str:
    """For differences of plans that are nearly alike."""
    shown = ["-" if estimate[name] is None else f"{estimate[name]:+.4f}" for name in ("value", "low", "high")]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def compare(one: Row, other: Row, what: str, instead: str) -> str:
    difference = value(one) - value(other)
    word = "costs" if difference > 0 else "gains"
    return f"{what} {word} {abs(difference):.3f} nats against {instead}"


def groups_of(row: Row) -> str:
    return "; ".join(span(group) for group in row["groups"]) or "-"


def span(layers: Sequence[int]) -> str:
    """`4-8` for neighbours, else all of them."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return " ".join(map(str, layers)) or "-"


def yes(flag: bool) -> str:
    return "in" if flag else "out"
