"""What lies in a folder beside the model: tokenizer and licence, from the caller or from where the model came from, and
the model card (README.md): base model and licence, plan, measured quality, engines that loaded it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fxfusion.checkpoints.folder import write_file
from fxfusion.checkpoints.gguf.header import GgufFile, is_gguf
from fxfusion.checkpoints.gguf.load import load_tokenizer
from fxfusion.checkpoints.reading import SafeFolder
from fxfusion.errors import CheckpointError
from fxfusion.plan.fusion_plan import FusionPlan

_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|merges|chat_template)\.(json|txt|jinja)"
    r"|(spiece|tokenizer|sentencepiece.*)\.model|.*\.tiktoken"
)
_LICENCE = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)[^/]*")
CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_MAX_CARD = 2**20
_NOBODY: Mapping[str, str | None] = {}
CardText = Callable[[Mapping[str, str | None]], str]
"""The content of a model card, by what the engines say: None for those that load the folder, else why not."""
_LICENCE_KEYS = ("license", "license_name", "license_link")

_NAMES = {"vllm": "vLLM", "tensorrt-llm": "TensorRT-LLM", "transformers": "`transformers`"}
_WAYS = {
    "transformers": """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({path}, trust_remote_code=True)
""",
    "vllm": """\
from vllm import LLM

model = LLM({path}, {more}trust_remote_code=True)
print(model.generate({prompt})[0].outputs[0].text)
""",
    "mlx-lm": "mlx_lm.generate --model {path} --trust-remote-code --prompt {prompt}\n",
    "llama.cpp": """\
from llama_cpp import Llama

print(Llama({path})({prompt})["choices"][0]["text"])
""",
}


@dataclass(frozen=True, slots=True)
class Companions:
    """`tokenizer`: one of transformers, or None; `base`: the folder that the model came from, where there is one;
    `files`: which of its files are taken along."""

    tokenizer: Any
    base: SafeFolder | None
    files: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> Companions:
        """Find them. Without `tokenizer`, the files of the model's own folder are taken, or what the hub's cache on
        this machine has by its name; if there is neither, a warning says so."""
        name = base_name(model)
        base = SafeFolder.of(name) if name and os.path.isdir(name) else None
        names = sorted(path.name for path in base.path.iterdir()) if base is not None else []
        files = [one for one in names if _LICENCE.fullmatch(one)]
        if tokenizer is None:
            found = [one for one in names if _TOKENIZER.fullmatch(one)]
            files += found
            tokenizer = None if found or base is not None else _not_in_folder(name)
            if tokenizer is None and not found:
                where = f"{name} has none" if name else "where the model came from is not known"
                warnings.warn(f"no tokenizer is saved: none was given, and {where} (tokenizer=...)", stacklevel=3)
        return cls(tokenizer, base, tuple(files))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write them into an existing folder. Raises `CheckpointError` where the tokenizer cannot be saved."""
        if self.base is not None:
            for name in self.files:
                shutil.copyfile(self.base.file(name), Path(folder, name))
        if self.tokenizer is None:
            return
        try:
            self.tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # its native parts have errors of their own
            raise CheckpointError(
                f"the tokenizer ({type(self.tokenizer).__name__}) cannot be saved: {error}"
            ) from error


def write_beside(
    folder: Path, model: Any, tokenizer: Any, card: CardText | None, engines: Mapping[str, str | None] = _NOBODY
) -> None:
    """What every format has beside config and weights, into an existing folder. None for what there is not; `engines`:
    None for those that load it, else why not."""
    if getattr(model, "generation_config", None) is not None:
        write_file(folder / "generation_config.json", model.generation_config.to_json_string())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        write_file(folder / CARD, card(engines))


def base_name(model: Any) -> str:
    """What the model was loaded from, a folder or a name on the hub; "" where it is not known."""
    found = getattr(model, "name_or_path", "")
    return found if isinstance(found, str) else ""


def _not_in_folder(name: str) -> Any:
    """The tokenizer of a GGUF file, or of a model on the hub, if it is on this machine; None where there is none."""
    from transformers import AutoTokenizer

    if not name:
        return None
    if is_gguf(name):
        with suppress(CheckpointError):
            return load_tokenizer(name)
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # not there, or only with code of its own
        return None


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


def card_text(
    model: Any,
    plan: FusionPlan,
    form: str,
    given: Card | Mapping[str, Any] | None = None,
    engines: Mapping[str, str | None] = _NOBODY,
) -> str:
    """The content of README.md. `form`: of a folder, such as "canonical"; `engines` as of `CardText`."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    card = Card.of(given)
    base = _metadata_of(base_name(model))
    name, licence = _origin(model, base, card)
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
    ways = {one: how_to_run(form, one) for one, why in engines.items() if why is None}
    refused = [(_NAMES.get(one, one), why) for one, why in engines.items() if why is not None]
    told = {"base": name or _folder_name(model), "licence": licence, "plan": plan, "form": form, "ways": ways}
    return template.render(front_matter=data.to_yaml(), card=card, names=_NAMES, refused=refused, **told)


def how_to_run(form: str, engine: str, path: str | os.PathLike[str] = "this folder") -> str:
    """What to type: Python, or a command line. `tests/engines` runs these very texts."""
    quoted = {"path": json.dumps(os.fspath(path)), "prompt": json.dumps("Once upon a time")}
    return _WAYS[engine].format(more='model_impl="transformers", ' if form == "transformers" else "", **quoted)


def gguf_about(model: Any, plan: FusionPlan, given: Card | Mapping[str, Any] | None = None) -> dict[str, str | int]:
    """What a GGUF file says of itself, in settings: name, base model, licence, plan and quality (JSON)."""
    card = Card.of(given)
    base, licence = _origin(model, _metadata_of(base_name(model)), card)
    known = base or _folder_name(model)
    what = "fused" if plan.groups else "changed" if not plan.changes_nothing else ""
    found: dict[str, str | int] = {"general.name": f"{known} {what}".strip()}
    found |= {f"general.{key.replace('_', '.')}": value for key, value in licence.items()}
    if base is not None:
        found |= {"general.base_model.count": 1, "general.base_model.0.name": base}
    found["fxfusion.plan"] = json.dumps(plan.to_dict())
    if card.quality:
        found["fxfusion.quality"] = json.dumps(dict(card.quality))
    return found


def _origin(model: Any, base: Mapping[str, Any], card: Card) -> tuple[str | None, dict[str, Any]]:
    """Base model and licence, by the card or else by what the model came from. `base`: its metadata."""
    name = card.base_model or _hub_name(base_name(model)) or _first(base.get("base_model"))
    if card.license is not None:
        return name, {"license": card.license}
    return name, {key: base[key] for key in _LICENCE_KEYS if isinstance(base.get(key), str)}


def _metadata_of(name: str) -> dict[str, Any]:
    """The front matter of the base model's own card, of a GGUF file its licence; empty where none can be read."""
    from huggingface_hub import ModelCard

    if name and is_gguf(name):
        said = GgufFile.read(name).metadata
        keys = {key: f"general.{key.replace('_', '.')}" for key in _LICENCE_KEYS}
        return {key: said[setting] for key, setting in keys.items() if isinstance(said.get(setting), str)}
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
