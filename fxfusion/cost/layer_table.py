"""What each layer of a model holds, as a table: enough to plan by, without the model.

    layer   41    42   43   44   45        a run: layers 42-44, between mixers
    mixer   yes   no   no   no   yes       its leading layer: 41, whose FFN reads what 41's mixer wrote
    FFN     yes   yes  yes  yes  yes

A graph's chain is the run with the leading FFN in front. Tables of published models come with the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.plan.policy import describe

_FOLDER = resources.files("fxfusion.cost") / "architectures"


class Layer(BaseModel):
    """One decoder layer: whether it has a token mixer, and its FFN's intermediate channels (None: no FFN).

    A layer with neither is padding: the stream passes through. `num_key_value_heads` and `window` (tokens that its
    attention reaches back) are those of the table where they are None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    has_mixer: bool = Field(alias="attention", strict=True)
    ffn_width: int | None = Field(ge=0)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)

    @field_validator("ffn_width")
    @classmethod
    def _nothing_is_none(cls, width: int | None) -> int | None:
        return width or None


class LayerTable(BaseModel):
    """The layers of one model, and the sizes that they share. `gated`: FFNs have three matrices, not two."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str
    source: str = ""
    hidden_size: int = Field(ge=1)
    num_attention_heads: int | None = Field(default=None, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    vocab_size: int | None = Field(default=None, ge=1)
    tie_word_embeddings: bool = False
    gated: bool = True
    fused_slots: Mapping[int, str] = Field(default_factory=dict, description="layers made of several, and of which")
    layers: tuple[Layer, ...] = Field(alias="blocks")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> LayerTable:
        """A table from a JSON file. Raises `OptionError` that names the file and the field."""
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{os.fspath(path)}: cannot be read: {error}") from None
        return cls._parse(os.fspath(path), text)

    @classmethod
    def published(cls, name: str) -> LayerTable:
        """A table that comes with the package, one of `published_tables()`."""
        if name not in published_tables():
            raise OptionError(f"no table {name!r}; there are: {', '.join(published_tables())}")
        return cls._parse(name, (_FOLDER / f"{name}.json").read_text("utf-8"))

    @classmethod
    def _parse(cls, name: str, text: str) -> LayerTable:
        try:
            return cls.model_validate(json.loads(text))
        except ValidationError as error:
            raise OptionError(f"{name}: {describe(error, cls)}") from None
        except json.JSONDecodeError as error:
            raise OptionError(f"{name}: not valid JSON: {error}") from None

    def ffn_bytes(self, layer: int, bytes_per_parameter: int = 2) -> int:
        """Memory of one layer's FFN weights (without biases)."""
        width = self.layers[layer].ffn_width or 0
        return width * self.hidden_size * (3 if self.gated else 2) * bytes_per_parameter

    def without_mixer(self) -> tuple[int, ...]:
        """The layers that hold an FFN alone."""
        return tuple(
            number for number, layer in enumerate(self.layers) if not layer.has_mixer and layer.ffn_width is not None
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Layers that hold an FFN alone, with no mixer between them (padding may be).

    `leading`: the layer in front whose own mixer wrote the run's input; its FFN is the first of the graph's chain.
    None where no mixer stands in front, or its layer has no FFN.
    """

    layers: tuple[int, ...]
    leading: int | None


def published_tables() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    names = (file.name for file in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def runs(table: LayerTable) -> tuple[Run, ...]:
    """All maximal runs of FFNs without a mixer between them, in order; one FFN alone is a run too.

    Assumes that a layer's mixer stands before its FFN. Where both are parallel branches, nothing leads.
    """
    found: list[Run] = []
    members: list[int] = []
    leading: int | None = None
    for number, layer in enumerate(table.layers):
        if layer.has_mixer:
            if members:
                found.append(Run(tuple(members), leading))
            members, leading = [], None if layer.ffn_width is None else number
        elif layer.ffn_width is not None:
            members.append(number)
    if members:
        found.append(Run(tuple(members), leading))
    return tuple(found)


def paper_plan(
    table: LayerTable,
    splits: Iterable[int] | None = None,
    max_bytes: int | None = None,
    bytes_per_parameter: int = 2,
) -> FusionPlan:
    """The paper's choice: each run without its leading and its last FFN becomes one FFN, under the last one's norm.

    `splits`: layers at which a new group begins. `max_bytes`: fill each group from the left with as many FFNs as fit
    into that much memory. A group of one stays unfused. Raises `PlanError` for a split that splits nothing,
    `OptionError` where both are given.

    Source: arXiv 2503.18908, sections 3.2 and 5.3 (the last FFN stays out), eq. 5 (the norm).
    """
    if splits is not None and max_bytes is not None:
        raise OptionError("splits and max_bytes were both given; give one of them")
    if max_bytes is not None and max_bytes < 1:
        raise OptionError(f"max_bytes: expected at least 1, got {max_bytes}")
    fusable = [run.layers[:-1] for run in runs(table)]
    begins = frozenset(splits or ())
    useless = begins - {layer for members in fusable for layer in members[1:]}
    if useless:
        raise PlanError(f"splits: layer {min(useless)} is not inside a run of FFNs that could be fused")
    sizes: dict[Member, int] = {
        layer: table.ffn_bytes(layer, bytes_per_parameter) for members in fusable for layer in members
    }
    groups = [group for members in fusable for group in cut_run(members, begins, sizes, max_bytes)]
    return FusionPlan(
        groups=[group for group in groups if len(group) > 1], dropped_attention=table.without_mixer(), norm="last"
    )


def cut_run(
    members: Iterable[Member], begins: frozenset[int], sizes: Mapping[Member, int], room: int | None
) -> Iterator[tuple[Member, ...]]:
    """Consecutive groups of one run: a new one at each of `begins`, and where the next FFN has no room."""
    group: list[Member] = []
    for layer in members:
        full = room is not None and sum(sizes[member] for member in group) + sizes[layer] > room
        if group and (layer in begins or full):
            yield tuple(group)
            group = []
        group.append(layer)
    if group:
        yield tuple(group)
