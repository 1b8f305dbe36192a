"""A group as plans and policies name it: its members, and what happens to the mixers between them.

[4, 5, 6]                              members 4, 5, 6; no mixer may lie between them
{members: [4, 5], mixers: hoist}       a window: the mixers of layers 4 and 5 go first, one after another
{members: [4, 5], mixers: wide}        a window: they go first, and read one stream
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from fxfusion.plan.record import CheckedMember, Member, refuse, short

MixerMode = Literal["none", "hoist", "wide"]
MIXER_MODES: tuple[str, ...] = get_args(MixerMode)
_FIELDS = ("members", "mixers")

_MEMBERS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 2,
    "items": {"anyOf": [{"minimum": 0, "type": "integer"}, {"minLength": 1, "type": "string"}]},
}
_FIELDS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"members": _MEMBERS_SCHEMA, "mixers": {"enum": list(MIXER_MODES)}},
    "required": ["members"],
    "additionalProperties": False,
}


class PlannedGroup(tuple[Member, ...]):
    """The members of a group, a tuple like any other, that also knows its `mixers`.

    `mixers`: what becomes of the token mixers between the members. `"none"`: there are none, and one that is found
    is an error. `"hoist"`: they go before the FFNs, each reading what the one before wrote. `"wide"`: they go before
    the FFNs and read one stream. A group equals a plain tuple of the same members only where `mixers` is `"none"`.
    """

    mixers: MixerMode

    def __new__(cls, members: Iterable[Member] = (), mixers: MixerMode | None = None) -> PlannedGroup:
        """`mixers` None: as those of `members`, where that is a group, and else `"none"`."""
        group = super().__new__(cls, members)
        group.mixers = mixers if mixers is not None else getattr(members, "mixers", "none")
        return group

    @property
    def is_window(self) -> bool:
        """Whether mixers are moved for its sake."""
        return self.mixers != "none"

    def to_data(self) -> list[Member] | dict[str, Any]:
        """Plain data, as in a file."""
        members: list[Member] = list(self)
        return {"members": members, "mixers": self.mixers} if self.is_window else members

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and self.mixers == getattr(other, "mixers", "none")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.mixers)) if self.is_window else tuple.__hash__(self)

    def __repr__(self) -> str:
        members = tuple.__repr__(self)
        return f"PlannedGroup({members}, {self.mixers!r})" if self.is_window else members

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """How it is checked: a list of members, a mapping, or a group."""
        return core_schema.no_info_wrap_validator_function(
            _checked,
            handler.generate_schema(tuple[CheckedMember, ...]),
            serialization=core_schema.plain_serializer_function_ser_schema(PlannedGroup.to_data),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [_MEMBERS_SCHEMA, _FIELDS_SCHEMA]}


def told(group: Sequence[Member]) -> str:
    """`4-6` for the layers of a group, `4-5 hoist` for those of a window."""
    words: list[str] = []
    start: Member | None = None
    for member, after in zip(group, [*group[1:], None], strict=True):
        start = member if start is None else start
        if not (isinstance(member, int) and after == member + 1):
            words.append(str(member) if start == member else f"{start}-{member}")
            start = None
    mixers = getattr(group, "mixers", "none")
    return ",".join(words) + ("" if mixers == "none" else f" {mixers}")


def with_mixers(group: Any, mode: MixerMode) -> Any:
    """A group as given by hand, not checked yet, with its mixers named unless it names them itself."""
    if isinstance(group, Mapping):
        return {"mixers": mode, **group}
    if isinstance(group, list | tuple) and getattr(group, "mixers", "none") == "none":
        return PlannedGroup(group, mode)
    return group


def check_groups(groups: Sequence[PlannedGroup], what: str = "group") -> tuple[PlannedGroup, ...]:
    """The groups, layer numbers in order. Raises where one has less than two members, or two share one."""
    seen: dict[Member, int] = {}
    for index, group in enumerate(groups):
        if len(group) < 2:
            plural = "" if len(group) == 1 else "s"
            raise refuse(f"{what} {index} has {len(group)} member{plural}; a {what} needs at least two", index)
        for member in group:
            if member in seen:
                name = f"layer {member}" if isinstance(member, int) else repr(member)
                raise refuse(f"{name} is in {what} {seen[member]} and again in {what} {index}", index)
            seen[member] = index
    return tuple(_ordered(group) for group in groups)


def _ordered(group: PlannedGroup) -> PlannedGroup:
    """The layer numbers in increasing order: a group is a set, and equal plans should be equal."""
    numbers = iter(sorted(member for member in group if isinstance(member, int)))
    members = (next(numbers) if isinstance(member, int) else member for member in group)
    return PlannedGroup(members, group.mixers)


def _checked(value: Any, members: Any) -> PlannedGroup:
    """A group from a list, a mapping or a group; `members` checks a list of members."""
    if not isinstance(value, Mapping):
        return PlannedGroup(members(value), getattr(value, "mixers", "none"))
    for name in value:
        if name not in _FIELDS:
            raise refuse(f"unknown field {str(name)!r} (known: {', '.join(_FIELDS)})", str(name))
    mode = value.get("mixers", "none")
    if mode not in MIXER_MODES:
        raise refuse(f"expected one of {', '.join(MIXER_MODES)}, got {short(mode)}", "mixers")
    if "members" not in value:
        raise refuse("is missing", "members")
    try:
        return PlannedGroup(members(value["members"]), mode)
    except ValidationError as error:
        raise ValidationError.from_exception_data("group", [_inside(item) for item in error.errors()]) from None


def _inside(item: Any) -> InitErrorDetails:
    """An error of the list of members, at its place in the mapping."""
    kind = PydanticCustomError("plan", "{why}", item["ctx"]) if item["type"] == "plan" else item["type"]
    return InitErrorDetails(type=kind, loc=("members", *item["loc"]), input=item["input"])
