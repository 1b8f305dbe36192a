"""Short forms of module paths and of the sentences that hold them, for tables and the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from fxfusion.errors import Refusal
from fxfusion.report.model import Block

_NUMBERED = re.compile(r"^(.*?\.|)(\d+)((?:\.\D.*)?)$")
_PATH = re.compile(r"\b(?:[A-Za-z_]\w*\.)+\d+(?:\.\w+)*")


def compact(names: Sequence[str]) -> str:
    """`model.layers.3-8.mlp, lm_head` for those names: runs of numbers are joined, the order is kept."""
    parts = []
    for key, same in groupby(names, key=_frame):
        members = list(same)
        if key is None:
            parts += members
        else:
            parts.append(f"{key[0]}{_runs([_number(name) for name in members])}{key[1]}")
    return ", ".join(parts)


def label(block: Block) -> str:
    """What stands beside a box of the map: the end of the module path, from its last number on."""
    return tail(block.name)


def tail(name: str) -> str:
    """`3.mlp` for `model.layers.3.mlp`; names without a number stay whole."""
    found = _NUMBERED.match(name)
    return f"{found[2]}{found[3]}" if found else name


def alike(refusals: Iterable[Refusal]) -> Iterator[tuple[str, str, list[Refusal]]]:
    """Refusals that say the same of different layers, together: code, sentence, refusals.

    A sentence for several has `..` in place of the module paths that differ. The order is that of the
    first of each kind, mixers last: they are no failures.
    """
    kinds: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in refusals:
        kinds.setdefault((refusal.code.value, _PATH.sub("..", refusal.message)), []).append(refusal)
    ordered = sorted(kinds.items(), key=lambda item: item[0][0] == "token_mixing")
    for (code, sentence), same in ordered:
        messages = {refusal.message for refusal in same}
        yield code, messages.pop() if len(messages) == 1 else sentence.replace(" in ..", ""), same


def _frame(name: str) -> tuple[str, str] | None:
    """What stands around the last number of a path that has one."""
    found = _NUMBERED.match(name)
    return (found[1], found[3]) if found else None


def _number(name: str) -> int:
    found = _NUMBERED.match(name)
    assert found is not None
    return int(found[2])


def _runs(numbers: Sequence[int]) -> str:
    """`0-3,9` for 0 1 2 3 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
