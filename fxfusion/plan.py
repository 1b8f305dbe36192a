"""FusionPlan: the groups chosen for one model, written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fxfusion.errors import PlanError
from fxfusion.policy import NormMode, describe

Member = int | str


class FusionPlan(BaseModel):
    """Exactly these groups, in the numbers of the model as it was loaded.

    `groups`: each a list of at least two members; a member is the position of a decoder layer (int)
    or the module path of an FFN (str), such as `"model.layers.3.mlp"`. Members of a group must be
    neighbours in one chain. `dropped_attention`: layers whose attention was removed before capture;
    the compiler does not remove attention itself, it records what the plan assumes.
    `norm`: see `FusionPolicy`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: tuple[tuple[Member, ...], ...] = ()
    dropped_attention: tuple[int, ...] = ()
    norm: NormMode = Field(default="fold")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise PlanError(f"plan: {describe(error, type(self))}") from None

    @field_validator("groups")
    @classmethod
    def _groups_are_groups(cls, groups: tuple[tuple[Member, ...], ...]) -> tuple[tuple[Member, ...], ...]:
        seen: dict[Member, int] = {}
        for index, group in enumerate(groups):
            if len(group) < 2:
                raise ValueError(f"group {index} has {len(group)} member; a group needs at least two")
            for member in group:
                if isinstance(member, int) and member < 0:
                    raise ValueError(f"group {index}: layer {member} is negative")
                if member in seen:
                    raise ValueError(f"{member!r} is in group {seen[member]} and again in group {index}")
                seen[member] = index
        return groups

    @model_validator(mode="after")
    def _dropped_is_a_set(self) -> FusionPlan:
        if any(layer < 0 for layer in self.dropped_attention):
            raise ValueError("dropped_attention: a layer number is negative")
        if len(set(self.dropped_attention)) != len(self.dropped_attention):
            raise ValueError("dropped_attention: a layer is named twice")
        return self

    @classmethod
    def resolve(cls, value: Mapping[str, Any] | FusionPlan) -> FusionPlan:
        """A plan from a dict or a plan. Raises `PlanError` that names the field."""
        if isinstance(value, FusionPlan):
            return value
        if isinstance(value, Mapping):
            return cls(**dict(value))
        raise PlanError(f"plan: expected a FusionPlan or a dict, got {type(value).__name__}")
