"""Where to put a model: alternatives of tensor-parallel size and of cutting its runs of FFNs, with what each costs.

A fused FFN is cut by channels over all devices, as every other: one all-reduce for each group, whatever its width. What
limits a group is memory while it is made: its wide weights stand beside the whole model until its members are freed,
so a group may be as large as what the model leaves free (`fxfusion.fuse` works so).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxfusion.cost.cuts import Cut, Run, even, fill, fusable_runs, fused
from fxfusion.cost.hardware import Hardware
from fxfusion.cost.kernels import Workload
from fxfusion.cost.memory import step_bytes, sublayer_bytes
from fxfusion.cost.simulate import Simulation, simulate_step
from fxfusion.cost.sublayers import Ffn, Step
from fxfusion.errors import OptionError
from fxfusion.plan.policy import FusionPolicy

_PARTS = (4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One alternative. `cut`: how groups were chosen, in words; `groups`: members of each.

    `making`: bytes of one device while the largest group is made. `fits`: whether the model runs there, `can_fuse`:
    whether it can be fused there too.
    """

    cut: str
    groups: tuple[int, ...]
    simulation: Simulation
    making: float

    @property
    def fits(self) -> bool:
        return self.simulation.fits_in_memory

    @property
    def can_fuse(self) -> bool:
        device = self.simulation.hardware
        return self.making <= device.memory * device.usable_memory

    def to_dict(self) -> dict[str, Any]:
        one = self.simulation
        return {
            "tp": one.work.tp,
            "cut": self.cut,
            "groups": list(self.groups),
            "latency_ms": one.latency_ms,
            "tokens_per_second": one.tokens_per_second,
            "all_reduces": one.all_reduces,
            "bytes_per_gpu": one.bytes_per_gpu,
            "bytes_while_fusing": round(self.making),
            "fits_in_memory": self.fits,
            "can_fuse": self.can_fuse,
            "cost_per_million_tokens": one.cost_per_million_tokens,
        }


@dataclass(frozen=True, slots=True)
class Placements:
    """All alternatives, by tensor-parallel size. `refused`: sizes that cannot be had, and why."""

    rows: tuple[Placement, ...]
    refused: Mapping[int, str]

    @property
    def quickest(self) -> Placement | None:
        """The least latency among those that fit and can be fused where they run; None if none does."""
        good = [row for row in self.rows if row.fits and row.can_fuse]
        return min(good, key=lambda row: row.simulation.latency_ms, default=None)

    def to_dict(self) -> dict[str, Any]:
        best = self.quickest
        return {
            "placements": [row.to_dict() for row in self.rows],
            "refused": {str(tp): why for tp, why in self.refused.items()},
            "quickest": None if best is None else best.to_dict(),
        }


def placements(
    step: Step,
    work: Workload,
    device: Hardware,
    *,
    sizes: Sequence[int] | None = None,
    policy: str | Mapping[str, object] | FusionPolicy | None = "paper",
    price: float | None = None,
) -> Placements:
    """Try tensor-parallel sizes (default: powers of two up to what the link joins) and cuts of the step's runs.

    Cuts: none; each run into at most 4, 2, 1 groups of even width; each run filled from the left with as many FFNs as
    the devices have room for, and as few groups of even width. `policy`: which ends of a run stay out.
    """
    rule = FusionPolicy.resolve(policy)
    most = 1 if device.link is None else device.link.devices
    rows: list[Placement] = []
    refused: dict[int, str] = {}
    for tp in sizes or [2**power for power in range(most.bit_length()) if 2**power <= most]:
        try:
            rows += _at(step, replace(work, tp=tp), device, fusable_runs(step, rule), price)
        except OptionError as error:
            refused[tp] = str(error)
    return Placements(tuple(rows), refused)


def _at(step: Step, work: Workload, device: Hardware, runs: Sequence[Run], price: float | None) -> Iterator[Placement]:
    """The alternatives at one size, none twice."""
    resident = step_bytes(step, work).total
    room = device.memory * device.usable_memory - resident
    share = {place: sublayer_bytes(step.sublayers[place], step.hidden, work) for run in runs for place in run}
    seen: set[tuple[Cut, ...]] = set()
    for name, cuts in _cuts(runs, share, room):
        if cuts in seen:
            continue
        seen.add(cuts)
        after = fused(step, cuts)
        wide = [part for part in after.sublayers if isinstance(part, Ffn) and part.members > 1]
        largest = max((sublayer_bytes(part, step.hidden, work) for part in wide), default=0.0)
        found = simulate_step(after, work, device, price=price)
        groups = tuple(part.members for part in wide)
        yield Placement(cut=name if groups else "not fused", groups=groups, simulation=found, making=resident + largest)


def _cuts(runs: Sequence[Run], share: Mapping[int, float], room: float) -> Iterator[tuple[str, tuple[Cut, ...]]]:
    sizes = [[share[place] for place in run] for run in runs]
    yield "as given", tuple(tuple((place,) for place in run) for run in runs)
    for count in _PARTS:
        name = "whole runs" if count == 1 else f"even, {count} a run"
        yield name, tuple(even(run, widths, count) for run, widths in zip(runs, sizes, strict=True))
    if runs and room >= min(map(min, sizes)):
        filled = tuple(fill(run, widths, room) for run, widths in zip(runs, sizes, strict=True))
        yield "memory, from the left", filled
        parts = zip(runs, sizes, filled, strict=True)
        yield "memory, even", tuple(even(run, widths, len(cut)) for run, widths, cut in parts)
