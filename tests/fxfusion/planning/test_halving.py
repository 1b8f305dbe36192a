"""Successive halving: what is measured how closely, what the rest is taken to cost, and going on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxfusion.analysis.store import Store
from fxfusion.errors import NotFusedError, OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.halving import Halving, steps
from fxfusion.planning.roads import plan_of
from fxfusion.planning.roads.road import Segment

COUNT = 16
PLANS = {(one := Segment(layer, layer + 1, "hoist")): plan_of([one], range(COUNT + 1)) for layer in range(COUNT)}


def loss_of(first: int) -> float:
    return 0.01 * (first + 1) ** 2


class OwnMeter:
    """Off by the first layer's number; a loss that grows with its square; `odd` says otherwise of some."""

    def __init__(self, odd: Callable[[str, int], Any] = lambda what, first: ()) -> None:
        self.asked: list[tuple[str, int]] = []
        self.odd = odd

    def distance(self, plan: FusionPlan, first: int, last: int) -> float | None:
        return self._found("off", first, 0.1 * (first + 1))

    def increase(self, plan: FusionPlan, first: int, batches: int | None = None) -> float:
        what = "closely" if batches is None else "roughly"
        found: float = self._found(what, first, loss_of(first) * (1.0 if batches is None else 1.1))
        return found

    def _found(self, what: str, first: int, usual: float) -> Any:
        self.asked.append((what, first))
        found = self.odd(what, first)
        if isinstance(found, Exception):
            raise found
        return usual if found == () else found

    def of(self, what: str) -> list[int]:
        return [first for kind, first in self.asked if kind == what]


def costs(meter: OwnMeter, path: Path | None = None) -> tuple[dict[int, float], Halving, int]:
    halving = Halving(meter, Store(path, "measured windows"))  # type: ignore[arg-type]
    advanced: list[int] = []
    found = halving.costs(PLANS, advanced.append)
    return {one.first: cost for one, cost in found.items()}, halving, sum(advanced)


def test_half_is_measured_on_few_tokens_and_a_quarter_on_all() -> None:
    meter = OwnMeter()
    found, _, advanced = costs(meter)
    assert meter.of("off") == list(range(16)) and meter.of("roughly") == list(range(8))
    assert meter.of("closely") == [0, 1, 2, 3]
    assert advanced == steps(16) == len(meter.asked) == 28
    assert [found[first] for first in range(4)] == [loss_of(first) for first in range(4)]
    assert [found[first] for first in range(4, 8)] == [1.1 * loss_of(first) for first in range(4, 8)]
    assert [found[first] for first in range(8, 16)] == pytest.approx([1.1 * loss_of(first) for first in range(8, 16)])


def test_what_looks_worse_than_it_is_is_measured_no_closer() -> None:
    """The order of the first stage decides, that of the second the next one."""
    found, halving, _ = costs(OwnMeter(lambda what, first: 9.0 if (what, first) == ("off", 0) else ()))
    assert {one.first for one in halving.roughly} == set(range(1, 9))
    assert found[0] > 10, "a guess, by how far it is off"
    meter = OwnMeter(lambda what, first: 5.0 if (what, first) == ("roughly", 0) else ())
    found, halving, _ = costs(meter)
    assert meter.of("closely") == [1, 2, 3, 4] and found[0] == 5.0


def test_a_window_whose_end_cannot_be_told_is_measured() -> None:
    meter = OwnMeter(lambda what, first: None if (what, first) == ("off", 15) else ())
    found, _, _ = costs(meter)
    assert meter.of("roughly")[0] == 15 and found[15] == 1.1 * loss_of(15)


def test_windows_that_cannot_be_had_are_left_out_with_the_reason() -> None:
    odd = {("off", 1): NotFusedError("no"), ("off", 2): math.inf, ("roughly", 0): math.nan}
    found, halving, _ = costs(OwnMeter(lambda what, first: odd.get((what, first), ())))
    words = {one.first: why for one, why in halving.refused.items()}
    assert words == {
        0: "with layers 0 to 1 changed the loss is not finite",
        1: "no",
        2: "with layers 2 to 3 changed the stream is not finite",
    }
    assert set(found) == set(range(3, 16))


def test_a_search_that_was_stopped_goes_on(tmp_path: Path) -> None:
    def stop(what: str, first: int) -> Any:
        if (what, first) == ("closely", 2):
            raise KeyboardInterrupt
        return ()

    path = tmp_path / "windows.json"
    with pytest.raises(KeyboardInterrupt):
        costs(OwnMeter(stop), path)
    rest = OwnMeter()
    found, _, _ = costs(rest, path)
    assert rest.asked == [("closely", 2), ("closely", 3)]
    assert found == costs(OwnMeter())[0]


def test_a_broken_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "windows.json"
    costs(OwnMeter(), path)
    path.write_text(path.read_text().replace("0.2", '"much"', 1))
    with pytest.raises(OptionError, match="much"):
        costs(OwnMeter(), path)
