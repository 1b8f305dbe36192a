"""Files that people edit: YAML in, with the line of every value, and YAML out, in one piece or not at all.

Nothing here knows what a plan is. A file is data: no anchors (a small file could stand for a huge one), no tags
(they could name Python objects), no field twice, plain decimal numbers, and not large.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxfusion.errors import PlanError
from fxfusion.files import replacing

if TYPE_CHECKING:
    from yaml import Node, SafeDumper, ScalarNode
    from yaml.events import Event

Place = tuple[int | str, ...]

KIND = "plan"
MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_VALUES = 20_000  # the parser needs a second or two for so many
_WIDTH = 110  # characters in a line of the file

_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,17})")
# YAML 1.1 takes 1e-5 for text (it wants 1.0e-5), JSON and everybody else for a number.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Document:
    """The data of a file, and the line (from 1) of each value by its place, such as `("groups", 1)`."""

    name: str
    data: Any
    lines: Mapping[Place, int]

    def error(self, place: Place, why: str) -> PlanError:
        """An error at a place; what is missing is looked for where it should be."""
        known = next((place[:end] for end in range(len(place), 0, -1) if place[:end] in self.lines), ())
        return PlanError(f"{self.name}:{self.lines.get(known, 1)}: {located(place, why)}")


def located(place: Place, why: str) -> str:
    """`groups[1]: why`"""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return f"{steps.removeprefix('.')}: {why}" if place else why


def read(path: str | os.PathLike[str]) -> Document:
    """The data of a YAML or JSON file. Raises `PlanError` that names file and line."""
    name = os.fspath(path)
    text = _text(name)
    if name.lower().endswith(".json"):
        text = text.replace("\t", " ")  # JSON may be indented with tabs, YAML may not
    node = _compose(name, text)
    if node is None:
        raise PlanError(f"{name}: the file is empty")
    reader = _Reader(name)
    return Document(name, reader.value(node, ()), reader.lines)


def _text(name: str) -> str:
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{name}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a name that no file can have
        raise PlanError(f"{name!r}: cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise PlanError(f"{name}: larger than {MAX_BYTES} bytes, so it is no plan file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise PlanError(f"{name}: not a text file (UTF-8)") from None


def _compose(name: str, text: str) -> Node | None:
    """The tree of a file's only document; what it may not hold is refused before the tree is built."""
    import yaml

    depth = values = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise PlanError(f"{name}:{_line(event)}: anchors (&) and aliases (*) are not allowed")
            values += isinstance(event, yaml.NodeEvent)
            if values > MAX_VALUES:
                raise PlanError(f"{name}:{_line(event)}: more than {MAX_VALUES} values, so it is no plan file")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise PlanError(f"{name}:{_line(event)}: nested more than {MAX_DEPTH} levels deep")
        node: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise PlanError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PlanError(f"{name}:{line}: not a text file: character {error.character!r} in it") from None
    return node


class _Reader:
    """Turns a tree into data, and notes where everything stands."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Place, int] = {}

    def value(self, node: Node, place: Place) -> Any:
        import yaml

        self.lines.setdefault(place, _line(node))
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node.value, place)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind, place)
        raise self._error(node, place, f"the tag {node.tag} has no place here")

    def _mapping(self, pairs: list[tuple[Node, Node]], place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key.tag != f"{_TAG}str" or not isinstance(key.value, str):
                raise self._error(key, place, "the name of a field must be text")
            inner = (*place, key.value)
            if key.value in found:
                raise self._error(key, inner, f"the field was given before, in line {self.lines[inner]}")
            self.lines[inner] = _line(key)
            found[key.value] = self.value(value, inner)
        return found

    def _scalar(self, node: ScalarNode, kind: str, place: Place) -> str | int | float | bool | None:
        text = node.value
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in {"true", "yes", "on", "false", "no", "off"}:
            return text.lower() in {"true", "yes", "on"}
        if kind == "int" and _INTEGER.fullmatch(text):
            return int(text)
        if kind == "float" and _NUMBER.fullmatch(text):
            return float(text)
        if kind in {"str", "timestamp", "value", "merge"}:
            unquoted = node.style is None and kind == "str"
            return float(text) if unquoted and _NUMBER.fullmatch(text) else _paired(text)
        if kind in {"int", "float"}:
            raise self._error(node, place, f"write the number {text[:40]!r} in plain decimal")
        raise self._error(node, place, f"the tag {node.tag} has no place here")

    def _error(self, node: Node, place: Place, why: str) -> PlanError:
        return PlanError(f"{self.name}:{_line(node)}: {located(place, why)}")


def _paired(text: str) -> str:
    """JSON writes a character beyond 16 bits as two escapes, which YAML takes for two characters."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _line(part: Node | Event) -> int:
    """The line from 1; only what no file holds has no mark."""
    return 1 if part.start_mark is None else part.start_mark.line + 1


def write(path: str | os.PathLike[str], data: Mapping[str, Any], header: str = "", overwrite: bool = False) -> None:
    """Write fields as YAML, or as JSON (without the header) where the name ends in .json.

    The file is whole or, where that fails, what it was before; one that is no plan as it was written here stays, unless
    with `overwrite`. Raises `PlanError`.
    """
    as_json = os.fspath(path).lower().endswith(".json")
    text = json.dumps(data, indent=1) + "\n" if as_json else to_yaml(data, header)
    with replacing(path, KIND, overwrite=overwrite, error=PlanError) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def to_yaml(data: Mapping[str, Any], header: str = "") -> str:
    """Fields as YAML, in the order given; a list of plain values, and a mapping in a list, take one line."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Plain.add_representer(str, _represent_text)
    Plain.add_representer(list, _represent_list)
    Plain.add_representer(dict, _represent_dict)
    return _commented(header) + yaml.dump(dict(data), Dumper=Plain, width=_WIDTH, sort_keys=False, allow_unicode=True)


def _commented(header: str) -> str:
    lines: list[str] = []
    for line in header.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line, _WIDTH, initial_indent="# ", subsequent_indent=f"#   {indent}")
    return "".join(f"{line}\n" for line in lines)


def _represent_text(dumper: SafeDumper, text: str) -> Node:
    if not text.isprintable():
        style: str | None = '"'  # the only one that escapes
    else:
        style = "'" if _NUMBER.fullmatch(text) else None  # or it would come back as a number
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _represent_list(dumper: SafeDumper, items: list[Any]) -> Node:
    nested = any(isinstance(item, list | dict) for item in items)
    node = dumper.represent_sequence(f"{_TAG}seq", items, flow_style=not nested)
    for item in node.value:
        item.flow_style = True
    return node


def _represent_dict(dumper: SafeDumper, fields: dict[Any, Any]) -> Node:
    return dumper.represent_mapping(f"{_TAG}map", fields, flow_style=False)
