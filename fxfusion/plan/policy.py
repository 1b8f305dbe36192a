"""FusionPolicy: a rule that chooses groups, where no plan names them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fxfusion.errors import OptionError
from fxfusion.plan.file import located
from fxfusion.plan.groups import PlannedGroup, check_groups, with_mixers
from fxfusion.plan.record import refuse

NormMode = Literal["fold", "last"]


class FusionPolicy(BaseModel):
    """How chains become groups.

    `include_leading`: whether the FFN of the layer whose mixer wrote the chain's input may join.
    `keep_last`: how many FFNs at the end of each chain stay out. `min_members` counts what remains.
    `max_members` [FFNs] and `max_width` [intermediate channels] split a chain into several groups.
    `norm`: `"fold"` gives every member its own norm gain (folded into its weights); `"last"` gives
    every member the last member's norm (arXiv 2503.18908, eq. 5).
    `profitable_only`: leave a group as it was (sequential) where one wide FFN would not be faster here; without it
    such a group is computed member by member, in parallel form, so that results do not depend on the machine.
    `windows`: layers whose mixers go before their FFNs, `[[4, 5], {"members": [6, 7], "mixers": "wide"}]` (a list
    means `"hoist"`); see `fxfusion.plan.groups`. A window is one group, exactly its members: the fields above do
    not apply to it, except `norm`. Members are as in `FusionPlan`. APPROXIMATE, so nothing moves unless named here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_leading: bool = True
    keep_last: int = Field(default=0, ge=0)
    min_members: int = Field(default=2, ge=2)
    max_members: int | None = Field(default=None, ge=2)
    max_width: int | None = Field(default=None, ge=1)
    norm: NormMode = "fold"
    profitable_only: bool = False
    windows: tuple[PlannedGroup, ...] = ()

    @field_validator("windows", mode="before")
    @classmethod
    def _a_list_means_hoist(cls, windows: Any) -> Any:
        return [with_mixers(window, "hoist") for window in windows] if isinstance(windows, list | tuple) else windows

    @field_validator("windows")
    @classmethod
    def _windows_move_mixers(cls, windows: tuple[PlannedGroup, ...]) -> tuple[PlannedGroup, ...]:
        for index, window in enumerate(windows):
            if not window.is_window:
                raise refuse("a window moves mixers: expected hoist or wide, got 'none'", index, "mixers")
        return check_groups(windows, "window")

    @classmethod
    def resolve(cls, value: str | Mapping[str, object] | FusionPolicy | None) -> FusionPolicy:
        """A policy from a preset's name, a dict of fields, a policy, or None (the default).

        Raises `OptionError` naming the preset or field that is wrong.
        """
        if value is None:
            return cls()
        if isinstance(value, FusionPolicy):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise OptionError(f"policy: no preset {value!r}; known presets: {', '.join(sorted(PRESETS))}")
            return PRESETS[value]
        if not isinstance(value, Mapping):
            raise OptionError(f"policy: expected a preset name or a dict of fields, got {type(value).__name__}")
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            raise OptionError(f"policy: {describe(error, cls)}") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per wrong field: its name, what is wrong, and the fields there are."""
    parts = []
    for item in error.errors():
        field = located((*item["loc"], *item.get("ctx", {}).get("at", ())), "").removesuffix(": ") or "value"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown field {field!r} (known: {', '.join(model.model_fields)})")
        elif item["type"] == "plan":
            parts.append(f"{field}: {item['msg']}")
        else:
            parts.append(f"{field}: {item['msg']}, got {item['input']!r}")
    return "; ".join(parts)


PRESETS: dict[str, FusionPolicy] = {
    "maximal": FusionPolicy(),
    "paper": FusionPolicy(include_leading=False, keep_last=1, norm="last"),
}
