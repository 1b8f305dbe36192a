"""FusionPlan: the groups chosen for one model, written down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fxfusion.errors import PlanError
from fxfusion.plan import file as plan_file
from fxfusion.plan.file import Place
from fxfusion.plan.groups import MixerMode, PlannedGroup, check_groups, told, with_mixers
from fxfusion.plan.policy import NormMode
from fxfusion.plan.record import (
    CheckedLayer,
    LayerFit,
    LayerScore,
    MadeBy,
    MeasuredQuality,
    Member,
    ModelFacts,
    Record,
    Refit,
    ResidueFile,
    Scores,
    Versions,
    refuse,
    refuse_repeated,
    short,
)

__all__ = [
    "FusionPlan",
    "LayerScore",
    "MadeBy",
    "MeasuredQuality",
    "Member",
    "MixerMode",
    "ModelFacts",
    "PlannedGroup",
    "Refit",
    "ResidueFile",
    "Scores",
    "Versions",
    "schema_text",
]

VERSION = 1
SUFFIXES = (".yaml", ".yml", ".json")
_HOIST = "hoist"

_HEADER = """\
Plan of fxfusion: which layers lose their attention, and which FFNs become one. It may be edited.
A layer is the position of a decoder layer in the model as it was loaded, counted from 0."""


def _shorthands(schema: dict[str, Any]) -> None:
    """What a plan may be given besides its fields."""
    words = "short for mixers: hoist in every group that does not name its mixers"
    schema["properties"][_HOIST] = {"default": False, "description": words, "title": "Hoist", "type": "boolean"}


class FusionPlan(Record):
    """Exactly these groups, in the numbers of the model as it was loaded.

    `groups`: each a list of at least two members; a member is the position of a decoder layer (int)
    or the module path of an FFN (str), such as `"model.layers.3.mlp"`. Members of a group must be
    neighbours in one chain. Where token mixers lie between them the group is a window, written
    `{"members": [4, 5], "mixers": "hoist"}` (or `"wide"`): see `fxfusion.plan.groups`. `hoist=True` is
    short for `"hoist"` in every group that does not name its mixers; it is not a field.
    `dropped_attention`: layers whose attention was removed before capture;
    the compiler does not remove attention itself, it records what the plan assumes.
    `removed`: layers that go whole, attention and FFN, in `fxfusion.fuse`; the compiler refuses such a plan.
    `norm`: see `FusionPolicy`. The other fields are a record: they do not change what is fused.

    Each of `plan.groups` is a tuple of its members that also has `.mixers`; `plan.mixers_of(index)` and
    `plan.windows` tell the same. A slice of `plan.groups` goes into another plan with its mixers, `list(group)`
    loses them: write `group.to_data()` where a group becomes plain data.
    """

    model_config = ConfigDict(json_schema_extra=_shorthands)

    groups: tuple[PlannedGroup, ...] = Field(
        default=(),
        description="lists of FFNs that become one FFN each: neighbouring layers, or module paths of FFNs; or "
        "{members: [4, 5], mixers: hoist} (or wide), whose mixers go before its FFNs",
    )
    dropped_attention: tuple[CheckedLayer, ...] = Field(default=(), description="layers that lose their attention")
    removed: tuple[CheckedLayer, ...] = Field(default=(), description="layers that go whole: attention and FFN")
    norm: NormMode = Field(
        default="fold", description="fold (each FFN keeps its own norm gain) or last (a group takes the last FFN's)"
    )
    version: Literal[1] = Field(default=1, description="format of this file")
    model: ModelFacts | None = Field(default=None, description="the model that the plan was made for")
    scores: Scores | None = Field(default=None, description="what each layer's attention is worth (a record)")
    refit: Refit | None = Field(default=None, description="that the fused model was refitted, and on what (a record)")
    quality: MeasuredQuality | None = Field(default=None, description="what the plan was measured to cost (a record)")
    made_by: MadeBy | None = Field(default=None, description="command, date, seed and versions (a record)")
    residue: ResidueFile | None = Field(
        default=None, description="file beside the fused weights with what they do not tell of their members, by sha256"
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = "; ".join(plan_file.located(place, why) for place, why in _problems(error))
            raise PlanError(f"plan: {problems}") from None

    @model_validator(mode="before")
    @classmethod
    def _version_is_known(cls, fields: Any) -> Any:
        version = fields.get("version", VERSION) if isinstance(fields, Mapping) else VERSION
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise refuse(f"expected {VERSION}, got {short(version)}", "version")
        if version > VERSION:
            why = f"this plan has format {version}, newer than this fxfusion can read ({VERSION}); update fxfusion"
            raise refuse(why, "version")
        return fields

    @model_validator(mode="before")
    @classmethod
    def _hoist_is_written_out(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or _HOIST not in fields:
            return fields
        rest = {name: value for name, value in fields.items() if name != _HOIST}
        if not isinstance(fields[_HOIST], bool):
            raise refuse(f"expected true or false, got {short(fields[_HOIST])}", _HOIST)
        if fields[_HOIST] and isinstance(rest.get("groups"), list | tuple):
            rest["groups"] = [with_mixers(group, "hoist") for group in rest["groups"]]
        return rest

    @field_validator("groups")
    @classmethod
    def _groups_are_groups(cls, groups: tuple[PlannedGroup, ...]) -> tuple[PlannedGroup, ...]:
        return check_groups(groups)

    @field_validator("dropped_attention")
    @classmethod
    def _dropped_is_a_set(cls, dropped: tuple[int, ...]) -> tuple[int, ...]:
        refuse_repeated(dropped, "named")
        return dropped

    @field_validator("removed")
    @classmethod
    def _removed_is_a_set(cls, removed: tuple[int, ...]) -> tuple[int, ...]:
        refuse_repeated(removed, "removed")
        return tuple(sorted(removed))

    @model_validator(mode="after")
    def _removed_has_no_other_part(self) -> FusionPlan:
        for place, layer in self.layer_places():
            if layer in self.removed and place[0] in ("groups", "dropped_attention"):
                raise refuse(f"layer {layer} is removed as a whole, so it can have no other part in the plan", *place)
        return self

    @model_validator(mode="after")
    def _layers_exist(self) -> FusionPlan:
        problem = None if self.model is None else self.unknown_layer(self.model.layers)
        if problem is not None:
            place, why = problem
            raise refuse(why, *place)
        return self

    @property
    def changes_nothing(self) -> bool:
        """Whether the model stays as it is: nothing dropped, removed or fused."""
        return not (self.groups or self.dropped_attention or self.removed)

    @property
    def windows(self) -> tuple[PlannedGroup, ...]:
        """The groups whose mixers are moved."""
        return tuple(group for group in self.groups if group.is_window)

    def mixers_of(self, index: int) -> MixerMode:
        """What becomes of the mixers between the members of group `index`: `"none"`, `"hoist"` or `"wide"`."""
        return self.groups[index].mixers

    def unknown_layer(self, count: int) -> tuple[Place, str] | None:
        """The first layer number that a model of `count` decoder layers lacks: where it stands, and a sentence."""
        for place, layer in self.layer_places():
            if layer >= count:
                return place, f"layer {layer} does not exist: the model has {count} layers, counted from 0"
        return None

    def layer_places(self) -> list[tuple[Place, int]]:
        """Every layer number in the plan and where it stands, such as `(("groups", 0, 1), 5)`."""
        found: list[tuple[Place, int]] = []
        for index, group in enumerate(self.groups):
            found += [(("groups", index, at), member) for at, member in enumerate(group) if isinstance(member, int)]
        found += [(("dropped_attention", at), layer) for at, layer in enumerate(self.dropped_attention)]
        found += [(("removed", at), layer) for at, layer in enumerate(self.removed)]
        if self.scores is not None:
            found += [(("scores", "values", at, "layer"), score.layer) for at, score in enumerate(self.scores.values)]
        return found

    def replace(self, **changes: Any) -> FusionPlan:
        """A checked copy with some fields changed."""
        return FusionPlan(**{name: getattr(self, name) for name in FusionPlan.model_fields} | changes)

    def __str__(self) -> str:
        parts = [f"attention dropped: layers {told(self.dropped_attention)}"] if self.dropped_attention else []
        groups = "; ".join(map(told, self.groups))
        parts.append(f"layers whose FFNs become one: {groups} (norm {self.norm})" if groups else "nothing is fused")
        return "\n".join([*parts, *(str(one) for one in (self.quality, self.refit) if one is not None)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file; what was not recorded is left out."""
        fields = self.model_dump(mode="json", exclude_none=True)
        if not self.removed:
            del fields["removed"]
        return {"version": fields.pop("version"), **fields}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan as YAML (as JSON where the name ends in .json); `load` gives an equal plan back.

        The file is complete or, where that fails, what it was before. A plan that was written here is replaced while
        nobody edited it; another file only with `overwrite`. Raises `PlanError`.
        """
        explained = [f"  {name}: {field.description}" for name, field in FusionPlan.model_fields.items()]
        plan_file.write(path, self.to_dict(), header="\n".join([_HEADER, *explained]), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionPlan:
        """Read a plan file. Raises `PlanError` that names file, line and field, one line for each problem."""
        document = plan_file.read(path)
        if not isinstance(document.data, dict):
            raise document.error((), f"a plan is fields with values (name: value): {', '.join(cls.model_fields)}")
        plan = cls.__new__(cls)
        try:
            BaseModel.__init__(plan, **document.data)
        except ValidationError as error:
            lines = [str(document.error(place, why)) for place, why in _problems(error)]
            raise PlanError("\n".join(lines)) from None
        for index, group in enumerate(document.data.get("groups", ())):
            members = group["members"] if isinstance(group, dict) else group
            numbers = [member for member in members if isinstance(member, int)]
            if numbers != sorted(numbers):  # of no matter from a program; by hand, it is a slip of the fingers
                raise document.error(("groups", index), f"the layers {numbers} are not in increasing order")
        return plan

    @classmethod
    def resolve(cls, value: Any) -> FusionPlan:
        """A plan from a plan, a dict of its fields, or a plan file. Raises `PlanError` that names the field."""
        if isinstance(value, FusionPlan):
            return value
        if isinstance(value, Mapping):
            return cls(**{str(name): field for name, field in value.items()})
        if isinstance(value, os.PathLike) or _is_file_name(value):
            return cls.load(value)
        given = repr(value) if isinstance(value, str) else type(value).__name__
        endings = ", ".join(SUFFIXES)
        raise PlanError(f"plan: expected a FusionPlan or a dict, got {given} (or a plan file: {endings})")


def schema_text() -> str:
    """The JSON schema of a plan file, as in docs/plan.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **FusionPlan.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and (value.lower().endswith(SUFFIXES) or os.path.exists(value))


# How pydantic's terms read to somebody who edits a file.
_WORDS = {
    "tuple_type": "expected a list",
    "model_type": "expected fields with values (name: value)",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
}
_RECORDS: dict[tuple[str, ...], type[BaseModel]] = {
    (): FusionPlan,
    ("model",): ModelFacts,
    ("scores",): Scores,
    ("scores", "values"): LayerScore,
    ("refit",): Refit,
    ("refit", "fits"): LayerFit,
    ("made_by",): MadeBy,
    ("made_by", "versions"): Versions,
    ("residue",): ResidueFile,
}


def _problems(error: ValidationError) -> list[tuple[Place, str]]:
    """Where and what is wrong, in the order of the fields."""
    found: list[tuple[Place, str]] = []
    for item in error.errors(include_url=False):
        place: Place = (*item["loc"], *item.get("ctx", {}).get("at", ()))
        if item["type"] == "plan":
            found.append((place, item["ctx"]["why"]))
        elif item["type"] == "extra_forbidden":
            record = _RECORDS[tuple(step for step in place[:-1] if isinstance(step, str))]
            known = ", ".join([*record.model_fields, *([_HOIST] if record is FusionPlan else [])])
            found.append((place, f"unknown field {str(place[-1])!r} (known: {known})"))
        elif item["type"] == "missing":
            found.append((place, "is missing"))
        else:
            found.append((place, f"{_WORDS.get(item['type'], item['msg'])}, got {short(item['input'])}"))
    return found
