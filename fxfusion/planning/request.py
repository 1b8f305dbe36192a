"""What the planner is asked for, and what it cannot be asked: each check once, in the words of `make_plan`'s arguments.

A command makes a `Request` of its options, so that what contradicts itself is refused before torch is loaded; its
frame turns the names of arguments into those of options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from fxfusion.errors import OptionError
from fxfusion.planning.budget import Budget, Limits
from fxfusion.planning.roads import check_roads

if TYPE_CHECKING:
    from fxfusion.cost import Hardware

T = TypeVar("T")
AUTOMATIC_INCREASE = 0.01  # of the perplexity
AUTOMATIC_HARDWARE = "h100"
# What is refitted is a model of wider modules. No other engine loads one with wide blocks, so they are not chosen
# unless they are asked for.
REFITTED = ("drop", "hoist")
COMPILED = ("drop", "hoist", "wide")  # what `torch.compile` can do with a plan: it removes no layers
_QUALITY = ("max_perplexity_increase", "max_kl")
_BUDGETS = (*_QUALITY, "target_depth", "max_latency")
_DEVICE = (("tp", 1), ("precision", "bf16"))  # and what they are where nobody named them


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Arguments of `make_plan`, or of `sweep` (`every_depth`), that fit together. `roads` None: only FFNs that are
    neighbours once some attention is dropped become one. Raises `OptionError`."""

    budget: Budget = field(default_factory=Budget)
    limits: Limits = field(default_factory=Limits)
    dropped_attention: Sequence[int] | None = None
    norm: Any = None
    preset: str | None = None
    splits: Sequence[int] | None = None
    roads: Sequence[str] | None = None
    after_refit: bool | None = None
    max_window: int | None = None
    hardware: str | os.PathLike[str] | Hardware | None = None
    tp: int = 1
    precision: str = "bf16"
    drops: Sequence[int] | None = None
    every_depth: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Request:
        """Of arguments by name, among others that are about something else; `preset="automatic"` is written out."""
        budget, rest = _taken(Budget, given), _fields(cls, given)
        if rest.get("preset") == "automatic":
            rest["after_refit"] = rest.get("after_refit") is not False
            rest["hardware"] = rest.get("hardware") or AUTOMATIC_HARDWARE
            if rest.get("roads") is None:
                rest["roads"] = REFITTED if rest["after_refit"] else COMPILED
            if not budget.limits_quality and budget.most is None:
                budget = replace(budget, max_perplexity_increase=AUTOMATIC_INCREASE)
        return cls(budget=budget, limits=_taken(Limits, given), **rest)

    @property
    def named(self) -> dict[str, Any]:
        """Every argument that was given, by name."""
        parts: tuple[Any, ...] = (self, self.budget, self.limits)
        values = {each.name: getattr(part, each.name) for part in parts for each in fields(part)}
        return {name: value for name, value in values.items() if value is not None}

    def __post_init__(self) -> None:
        if self.preset not in (None, "paper", "automatic"):
            raise OptionError(f"preset: expected 'paper' or 'automatic', got {self.preset!r}")
        if self.roads is not None:
            object.__setattr__(self, "roads", check_roads(self.roads))
            self._check_over_roads()
        else:
            self._check_in_chains()
        self._check_hardware()

    def _refuse(self, names: Sequence[str], why: str) -> None:
        given = self.named
        wrong = next((name for name in names if name in given), None)
        if wrong is not None:
            raise OptionError(f"{wrong}: {why}")

    def _check_over_roads(self) -> None:
        names = ("drop", "dropped_attention", "splits", "drops")
        self._refuse(names, "over several roads the planner itself decides that; name another budget")
        if self.preset == "paper":
            raise OptionError("preset='paper' is a rule for dropped attention; it goes without roads")
        words = "windows are judged by their measured loss; it goes without roads only"
        self._refuse(["max_dependency"], words)
        if self.max_window is not None and self.max_window < 2:
            raise OptionError(f"max_window: expected at least 2 layers, got {self.max_window}")
        if not self.every_depth and not self.budget.limits_quality and self.budget.most is None:
            raise OptionError(f"roads: they need a budget, one of {', '.join(_BUDGETS)}")

    def _check_in_chains(self) -> None:
        words = "name the roads that it is about, such as roads='hoist', or take preset='automatic'"
        if self.after_refit:
            raise OptionError(f"after_refit: {words}")
        self._refuse(["max_window"], words)
        if self.budget.drop is not None and self.dropped_attention is not None:
            raise OptionError("drop and dropped_attention were both given; the second names the layers itself")
        if self.preset is None:
            self._refuse(["splits"], "it goes with preset='paper'; otherwise the cuts are found by measurement")
            return
        names = (*_BUDGETS, "max_members", "max_width", "max_dependency", "hardware")
        self._refuse(names, "preset='paper' is a rule that keeps no such budget")
        if self.norm == "fold":
            raise OptionError("norm: preset='paper' takes the norm of a group's last member, norm='last'")

    def _check_hardware(self) -> None:
        """A device is named where something is predicted for one, and only there."""
        if self.hardware is None:
            self._refuse(["max_latency"], "name the device that it is predicted for, such as hardware='h100'")
            for name, default in _DEVICE:
                if getattr(self, name) != default:
                    raise OptionError(f"{name}: name the device that it is about, such as hardware='h100'")
            return
        if not self.every_depth and not self.budget.limits_quality and self.budget.most is None:
            raise OptionError(f"hardware: latency is predicted under a budget, one of {', '.join(_BUDGETS)}")
        from fxfusion.cost import Hardware

        Hardware.of(self.hardware)


def _fields(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: given[each.name] for each in fields(kind) if each.name in given}


def _taken(kind: type[T], given: Mapping[str, Any]) -> T:
    return kind(**_fields(kind, given))
