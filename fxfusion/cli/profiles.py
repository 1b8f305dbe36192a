"""What `fxfusion auto --profile` stands for: one table of settings. Nothing here is heavy, since `--help` reads it.

| | quick | balanced | thorough |
|---|---|---|---|
| for | a first look, within minutes | the default | a result to keep |
| where no budget is given | nine tenths of the FFN depth | 1 % of the perplexity | 1 % of the perplexity |
| plans are judged | as they are | after their refit | after their refit |

An option on the command line wins over its profile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Profile(str, Enum):
    """How much time `auto` may take."""

    quick = "quick"
    balanced = "balanced"
    thorough = "thorough"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`sequences`, `batch`: of all text. `choosing`: tokens that plans are chosen by, None for all that is not held
    out. `roads`, `max_window`: which windows are candidates (None: as the planner says). `after_refit`: plans are
    judged after a refit each. `remaining`: the part of the FFN depth that may remain where no budget is given, None for
    1 % of the perplexity. `sides`: which ends of the blocks are refitted. `rounds`: of timing both models.
    """

    sequences: int
    batch: int
    choosing: int | None
    roads: tuple[str, ...] | None
    max_window: int | None
    after_refit: bool
    remaining: float | None
    sides: str
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "roads": None if self.roads is None else list(self.roads)}


PROFILES: dict[Profile, Settings] = {
    Profile.quick: Settings(
        sequences=64,  # of 256 tokens: 13,000 to refit to, four for each channel of a window of two FFNs of 1,536
        batch=4,  # logits over a vocabulary of 49,152 stay below 1 GB
        choosing=1024,
        roads=("hoist",),
        max_window=2,
        after_refit=False,
        remaining=0.9,
        sides="both",
        rounds=6,
    ),
    Profile.balanced: Settings(
        sequences=256,
        batch=8,
        choosing=None,
        roads=None,
        max_window=None,
        after_refit=True,
        remaining=None,
        sides="both",
        rounds=12,
    ),
    Profile.thorough: Settings(
        sequences=768,
        batch=8,
        choosing=None,
        roads=None,
        max_window=8,
        after_refit=True,
        remaining=None,
        sides="both",
        rounds=40,
    ),
}
