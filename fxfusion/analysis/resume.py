"""What lets a long measurement stop and go on: whose numbers are in a file, and files that are never half-written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fxfusion.errors import OptionError
from fxfusion.files import is_ours, replacing
from fxfusion.models.fingerprint import tensors_digest
from fxfusion.models.traced import TracedModel

MEASURED = "measurements"


def model_key(traced: TracedModel) -> str:
    """Digest over every byte of all parameters and buffers, and what attention is left out.

    Reads every weight once. Raises `OptionError` where the model has no weights (meta device).
    """
    tensors = tensors_digest(traced.model)
    if tensors is None:
        raise OptionError(f"{type(traced.model).__name__} is on the meta device: there is nothing to measure")
    return hashlib.sha256(f"{tensors} without {traced.dropped_attention}".encode()).hexdigest()[:16]


def check_batches(stored: Sequence[str], given: Sequence[str], where: object) -> None:
    """Raises `OptionError` unless the digests agree as far as both go: text may be added at the end, or left out."""
    for number, (one, other) in enumerate(zip(stored, given, strict=False)):
        if one != other:
            raise OptionError(f"{where} holds measurements on other text: batch {number} differs; use another place")


def check_facts(stored: Any, given: dict[str, Any], where: object) -> None:
    """Raises `OptionError` that names what is different."""
    facts = stored if isinstance(stored, dict) else {}
    wrong = [
        f"{name} is {facts.get(name)}, here it is {value}" for name, value in given.items() if facts.get(name) != value
    ]
    if wrong:
        raise OptionError(f"{where} holds another measurement ({'; '.join(wrong)}); use another place or delete it")


def read_json(path: Path, what: str) -> dict[str, Any] | None:
    """The object in a file, None where there is no file. Raises `OptionError` where there is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as {what}: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path} is not {what}: it holds a {type(found).__name__}")
    return found


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a file of ours by this object; it is whole at every moment. Raises `OptionError`, with the old file in
    place."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    with replacing(path, MEASURED) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file likewise."""
    from safetensors.torch import save

    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    with replacing(path, MEASURED) as scratch:
        scratch.write_bytes(content)


def remove_others(pattern: str, kept: Path) -> None:
    """Remove earlier files of ours beside this one."""
    for old in kept.parent.glob(pattern):
        if old != kept and is_ours(old, MEASURED):
            old.unlink(missing_ok=True)
