"""What plain attributes of configs and modules were, so that surgery can be taken back, now or much later.

Holds no code, so a model that carries one can be copied and pickled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None), list, tuple, dict)
_MACHINERY = frozenset(vars(nn.Module()))  # what a module keeps about itself


@dataclass(slots=True)
class Snapshot:
    """Owners with their plain attributes as they were."""

    before: list[tuple[Any, dict[str, Any]]]

    @classmethod
    def of(cls, owners: Iterable[Any]) -> Snapshot:
        unique = {id(owner): owner for owner in owners}
        return cls([(owner, plain_attributes(owner)) for owner in unique.values()])

    def changes(self) -> Changes:
        """What is different by now."""
        found = []
        for owner, old in self.before:
            now = plain_attributes(owner)
            changed = {name: value for name, value in old.items() if name not in now or now[name] != value}
            new = [name for name in now if name not in old]
            if changed or new:
                found.append((owner, changed, new))
        return Changes(found)


@dataclass(slots=True)
class Changes:
    """For each owner: old values of what changed, and names that are new."""

    items: list[tuple[Any, dict[str, Any], list[str]]]

    def undo(self) -> None:
        for owner, old, new in self.items:
            _put(owner, old, new)

    def undo_in(self, copies: Mapping[int, Any]) -> None:
        """The same in copies of the owners, where there is one: the memo of `copy.deepcopy`."""
        for owner, old, new in self.items:
            if id(owner) in copies:
                _put(copies[id(owner)], old, new)


def _put(owner: Any, old: Mapping[str, Any], new: Iterable[str]) -> None:
    for name in new:
        if name in vars(owner):
            delattr(owner, name)
    for name, value in old.items():
        setattr(owner, name, copy.deepcopy(value))


def plain_attributes(owner: Any) -> dict[str, Any]:
    """Numbers, flags, words and lists of them that a module or config was given, copied."""
    values = {name: value for name, value in vars(owner).items() if isinstance(value, _PLAIN)}
    return copy.deepcopy({name: value for name, value in values.items() if name not in _MACHINERY})
