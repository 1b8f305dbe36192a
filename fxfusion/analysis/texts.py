"""Batches of token ids out of text: a file, a folder, strings, a dataset; or out of ids that are stored already.

Documents are joined, each followed by the end-of-text token, and cut into rows of equal length, so that no row is
padded. A tokenizer that starts every text with a token (beginning of text) gets it at the start of every row:
models trained with it predict badly without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfusion.errors import OptionError
from fxfusion.report.progress import each

_STORED_IDS = ".safetensors"
# What the tokenizer gets at once: enough to use its threads, little enough to stop soon when there are enough tokens.
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 1000, 2**18


def batches_from_text(
    source: str | Path | Iterable[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    length: int,
    batch: int,
    limit: int | None = None,
    seed: int | None = 0,
    column: str = "text",
    suffixes: tuple[str, ...] = (".txt", ".md"),
    encoding: str = "utf-8",
    progress: bool = False,
) -> list[Tensor]:
    """Tokenize text and pack it into rows without padding.

    Args:
        source: a text file; a folder, searched recursively for files with one of `suffixes` (hidden ones are left
            out); an iterable of texts, such as a list; or one of dicts with a text in `column`, such as a
            `datasets.Dataset`. A `.safetensors` file goes to `batches_from_ids`.
        tokenizer: a transformers tokenizer with an end-of-text token. Not used for stored ids.
        length: tokens per row.
        batch: rows per batch.
        limit: number of batches at most. Reading stops as soon as there are enough tokens.
        seed: decides the order of the documents (an iterable without random access keeps its own) and of the rows
            read; equal arguments give equal batches. None: everything in order, files sorted by path.
        encoding: of the files.
        progress: say how far it is, on the error stream.

    Returns:
        `int64 [batch, length]` each. Rows that do not fill a batch are left out.

    Raises:
        OptionError (a ValueError): a source that does not exist or holds no text, too few tokens for one batch, a
            file that is not text, no such column, no tokenizer, numbers below their least.
        TypeError: a source or a document of another type.
    """
    _check_sizes(length, batch, limit)
    if isinstance(source, str | Path) and Path(source).suffix == _STORED_IDS:
        return batches_from_ids(source, length=length, batch=batch, limit=limit, seed=seed)
    start, end = _special_tokens(tokenizer)
    fresh = length - len(start)  # tokens of text per row
    documents = _documents(source, seed, column, suffixes, encoding)
    needed = None if limit is None else limit * batch * fresh
    tokens = _tokenize(each(documents, progress, "read text"), tokenizer, end, needed)
    if not len(tokens):
        raise OptionError(f"{_name(source)} holds no text: it is empty or blank")
    rows = tokens[: len(tokens) // fresh * fresh].view(-1, fresh)
    rows = torch.cat([torch.tensor([start], dtype=torch.int64).expand(len(rows), -1), rows], dim=1)
    return _to_batches(rows, batch, limit, seed, f"{_name(source)} has {len(tokens)} tokens", batch * fresh)


def batches_from_ids(
    file: str | Path,
    *,
    length: int,
    batch: int,
    limit: int | None = None,
    seed: int | None = 0,
    key: str = "input_ids",
) -> list[Tensor]:
    """Rows out of token ids in a safetensors file: `[tokens]`, or `[blocks, block]` where rows stay within a block.

    The rest of a block that fills no row is left out. Arguments, result and errors as in `batches_from_text`.
    """
    _check_sizes(length, batch, limit)
    stored = torch.atleast_2d(_load(Path(file), key))
    blocks, block = stored.shape
    if block < length:
        kind = "blocks of " if blocks > 1 else ""
        raise OptionError(
            f"{file} holds {kind}{block} tokens: one row of {length} needs {length}; give a smaller length"
        )
    rows = stored[:, : block // length * length].reshape(-1, length).to(torch.int64)
    return _to_batches(rows, batch, limit, seed, f"{file} has {stored.numel()} tokens", batch * length)


def _check_sizes(length: int, batch: int, limit: int | None) -> None:
    """A row of one token predicts nothing."""
    for name, value, least in (("length", length, 2), ("batch", batch, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise OptionError(f"{name} must be at least {least}, got {value}")


def _to_batches(rows: Tensor, batch: int, limit: int | None, seed: int | None, found: str, needed: int) -> list[Tensor]:
    if len(rows) < batch:
        raise OptionError(
            f"{found}: one batch of {batch} rows of {rows.shape[1]} needs {needed}; give more text, or a smaller"
            " length or batch"
        )
    if seed is not None:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return list(rows[: len(rows) // batch * batch].split(batch))[:limit]


# --- tokens -------------------------------------------------------------------------------------------


def _special_tokens(tokenizer: Any) -> tuple[list[int], int]:
    """What stands at the start of each row (one token or none), and behind each document."""
    if tokenizer is None:
        raise OptionError(f"text needs a tokenizer: give the model's, or token ids in a {_STORED_IDS} file")
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise OptionError("the tokenizer has no end-of-text token to put between documents: set its eos_token")
    with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = with_special[:1] if with_special[:1] != plain[:1] else []
    return start, tokenizer.eos_token_id


def _tokenize(documents: Iterable[str], tokenizer: Any, end: int, needed: int | None) -> Tensor:
    """Whole documents until there are `needed` tokens, each followed by the end-of-text token: `int64 [tokens]`."""
    parts, total = [torch.zeros(0, dtype=torch.int64)], 0
    for chunk in _chunks(documents):
        # verbose: it warns of texts longer than the model's context, but rows are cut to length here.
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(torch.tensor([*ids, end]))
            total += len(ids) + 1
        if needed is not None and total >= needed:
            break
    return torch.cat(parts)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in documents:
        if not document.strip():
            continue
        chunk.append(document)
        characters += len(document)
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


# --- documents ----------------------------------------------------------------------------------------


def _name(source: Any) -> str:
    """The source, for messages."""
    return str(source) if isinstance(source, str | Path) else f"the source ({type(source).__name__})"


def _documents(source: Any, seed: int | None, column: str, suffixes: tuple[str, ...], encoding: str) -> Iterator[str]:
    if isinstance(source, str | Path):
        files = _files(Path(source), suffixes)
        return (_read(files[number], encoding) for number in _order(len(files), seed))
    if isinstance(source, Mapping):
        raise OptionError(
            f"the source is a dict of {sorted(map(str, source))}: give one of these, such as its test part"
        )
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise TypeError(f"source must be a path, texts or a dataset, got {type(source).__name__}")
    if isinstance(source, Sized) and hasattr(source, "__getitem__"):
        return (_text(source[number], number, column) for number in _order(len(source), seed))
    return (_text(item, number, column) for number, item in enumerate(source))


def _order(count: int, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(count))
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or the files of the folder, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise OptionError(f"there is no file or folder {path} (a text itself goes into a list: [text])")
    inside = [file for file in path.rglob("*") if file.is_file()]
    shown = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    wanted = {suffix.lower() for suffix in suffixes}
    files = sorted(file for file in shown if file.suffix.lower() in wanted)
    if not files:
        common = Counter(file.suffix or "no suffix" for file in shown).most_common(5)
        there = ", ".join(f"{suffix} ({count})" for suffix, count in common) or "nothing"
        raise OptionError(f"{path} holds no file with {' or '.join(suffixes)}, but {there}: choose by suffixes=")
    return files


def _read(file: Path, encoding: str) -> str:
    try:
        return file.read_text(encoding=encoding).removeprefix("\ufeff")  # a mark that some editors put first
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise OptionError(f"{file} is not {encoding} text: {byte}; leave it out or give its encoding") from error
    except LookupError as error:
        raise OptionError(f"there is no encoding {encoding!r}") from error


def _text(item: Any, number: int, column: str) -> str:
    if isinstance(item, Mapping):
        if column not in item:
            raise OptionError(f"document {number} has no column {column!r}, but {sorted(map(str, item))}")
        item = item[column]
    if not isinstance(item, str):
        raise TypeError(f"document {number} must be a text, got {type(item).__name__}")
    return item


def _load(file: Path, key: str) -> Tensor:
    """Stored token ids: one or two dimensions, integers."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise OptionError(f"there is no file {file}")
    try:
        with safe_open(file, framework="pt") as stored:
            if key not in stored.keys():  # noqa: SIM118 - it is no dict
                raise OptionError(f"{file} has no {key!r}, but {sorted(stored.keys())}")
            ids: Tensor = stored.get_tensor(key)
    except SafetensorError as error:
        raise OptionError(f"{file} is not a whole safetensors file: {error}") from error
    if ids.is_floating_point() or ids.ndim not in (1, 2) or not ids.numel():
        raise OptionError(
            f"{key!r} in {file} must be integer ids [tokens] or [blocks, block], got {ids.dtype} {list(ids.shape)}"
        )
    return ids
