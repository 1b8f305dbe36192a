"""What lies in a folder beside the model: tokenizer and licence, from the caller or from where the model came from."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxfusion.checkpoints.reading import SafeFolder
from fxfusion.errors import CheckpointError

_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|merges|chat_template)\.(json|txt|jinja)"
    r"|(spiece|tokenizer|sentencepiece.*)\.model|.*\.tiktoken"
)
_LICENCE = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)[^/]*")


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
            tokenizer = None if found or base is not None else _from_cache(name)
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


def base_name(model: Any) -> str:
    """What the model was loaded from, a folder or a name on the hub; "" where it is not known."""
    found = getattr(model, "name_or_path", "")
    return found if isinstance(found, str) else ""


def _from_cache(name: str) -> Any:
    """The tokenizer of a model on the hub, if it is on this machine."""
    from transformers import AutoTokenizer

    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # not there, or only with code of its own
        return None
