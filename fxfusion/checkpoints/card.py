"""The model card (README.md) of a folder: base model and licence, plan, measured quality, engines that loaded it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fxfusion.checkpoints.companions import base_name
from fxfusion.checkpoints.reading import SafeFolder
from fxfusion.errors import CheckpointError
from fxfusion.plan.fusion_plan import FusionPlan

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_MAX_CARD = 2**20
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the caller knows. What is left out is read from the folder that the model came from.

    `base_model`: name on the hub. `license`: its identifier there. `language`: codes. `quality`: what was measured, by
    its name (`{"perplexity": 21.4, "perplexity of the base model": 21.3}`). `engines`: what has loaded the folder, with
    versions. `notes`: text that goes into the card as it is.
    """

    base_model: str | None = None
    license: str | None = None
    language: Sequence[str] = ()
    quality: Mapping[str, Any] = field(default_factory=dict)
    engines: Sequence[str] = ()
    notes: str = ""

    @classmethod
    def of(cls, given: Card | Mapping[str, Any] | None) -> Card:
        """Raises `CheckpointError` for a field that a card does not have."""
        if isinstance(given, Card):
            return given
        known = [one.name for one in fields(cls)]
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise CheckpointError(f"card: unknown field {unknown[0]!r} (known: {', '.join(known)})")
        return cls(**(given or {}))


def card_text(model: Any, plan: FusionPlan, form: str, given: Card | Mapping[str, Any] | None = None) -> str:
    """The content of README.md. `form`: "canonical" or "nemotron-nas"."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    card = Card.of(given)
    base = _metadata_of(base_name(model))
    name = card.base_model or _hub_name(base_name(model)) or _first(base.get("base_model"))
    licence = {key: base[key] for key in _LICENCE_KEYS if isinstance(base.get(key), str)}
    if card.license is not None:
        licence = {"license": card.license}
    data = ModelCardData(
        base_model=name,
        language=list(card.language) or base.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fxfusion", "ffn-fusion"],
        **licence,
    )
    text = (resources.files(__package__) / "card.md.j2").read_text("utf-8")
    # A README is Markdown, shown by sites that clean it themselves: escaping would spoil it.
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)  # noqa: S701
    return template.render(
        front_matter=data.to_yaml(), card=card, base=name or _folder_name(model), licence=licence, plan=plan, form=form
    )


def _metadata_of(name: str) -> dict[str, Any]:
    """The front matter of the base model's own card; empty where there is none that can be read."""
    from huggingface_hub import ModelCard

    if not name or not Path(name).is_dir():
        return {}
    folder = SafeFolder.of(name)
    if not folder.has(CARD):
        return {}
    with open(folder.file(CARD), "rb") as file:
        content = file.read(_MAX_CARD).decode("utf-8", errors="replace")
    try:
        found: dict[str, Any] = ModelCard(content, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody's README, with whatever in it: it is no card then
        return {}
    return found


def _hub_name(name: str) -> str | None:
    """`org/model`, also for the folder in the hub's cache that holds it."""
    cached = [match for part in Path(name).parts if (match := _CACHED.fullmatch(part))]
    if cached:
        return "/".join(cached[-1].groups())
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _folder_name(model: Any) -> str:
    name = base_name(model)
    return Path(name).resolve().name if name else type(model).__name__


def _first(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else None
