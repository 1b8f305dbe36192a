"""Short forms of numbers, of module paths and of the sentences that hold them, for tables and pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from fxfusion.errors import Refusal

HUES = 8  # colours of groups: h0 to h7, and then again

_NUMBERED = re.compile(r"^(.*?\.|)(\d+)((?:\.\D.*)?)$")
_PATH = re.compile(r"\b(?:[A-Za-z_]\w*\.)+\d+(?:\.\w+)*")


def compact(names: Sequence[str]) -> str:
    """`model.layers.3-8.mlp, lm_head` for those names: neighbours that differ in one number are joined."""
    runs: list[_Run] = []
    for name in names:
        if not (runs and runs[-1].take(name)):
            runs.append(_Run(name))
    return ", ".join(str(run) for run in runs)


class _Run:
    """Names that differ in one number: `parts` of the first, `place` of the number, the numbers."""

    def __init__(self, name: str) -> None:
        self.parts = name.split(".")
        self.place: int | None = None
        self.numbers: list[int] = []

    def take(self, name: str) -> bool:
        """Join the name, if it differs in the same number only."""
        parts = name.split(".")
        if len(parts) != len(self.parts):
            return False
        differ = [place for place, (one, two) in enumerate(zip(self.parts, parts, strict=True)) if one != two]
        if len(differ) != 1 or self.place not in (None, differ[0]):
            return False
        place = differ[0]
        if not (self.parts[place].isdecimal() and parts[place].isdecimal()):
            return False
        self.numbers = [*(self.numbers or [int(self.parts[place])]), int(parts[place])]
        self.place = place
        return True

    def __str__(self) -> str:
        if self.place is None:
            return ".".join(self.parts)
        return ".".join([*self.parts[: self.place], ranges(self.numbers), *self.parts[self.place + 1 :]])


def ranges(numbers: Sequence[int], between: str = ",") -> str:
    """`0-3,9` for 0 1 2 3 9."""
    runs: list[list[int]] = []
    for one in numbers:
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return between.join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def number(value: float, digits: int = 3) -> str:
    """`12,288`, `0.0123`, `1.2e-07`: short, and without an exponent where a reader expects none."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{round(value, places):,.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


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
