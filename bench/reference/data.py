"""The text the reference model learns: the Python standard library's own source files, as token ids.

Every file belongs to one of two parts by a rule that needs no list: it is held out if the SHA-256 of its path
below the library folder, modulo 100, is less than `HELD_OUT_PERCENT`. The library differs from one Python to
the next, so the ids used for measurements are exported with the model (see `bench.reference.export`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
HELD_OUT_PERCENT = 8
END_OF_TEXT = "<|endoftext|>"
_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})

TokenIds = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Both parts as token ids (`uint16 [tokens]`, each file ends with end-of-text), and the tokenizer."""

    train: TokenIds
    held_out: TokenIds
    tokenizer: Tokenizer


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this path (POSIX, below the library folder) belongs to the held-out part."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def library_files() -> Iterator[tuple[str, str]]:
    """Yield `(relative path, text)` of every `.py` file of the running Python's library, in sorted order.

    Files that are not UTF-8 (a few tests of the tokenizer of Python itself) are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE of `VOCABULARY` tokens (the end-of-text token has id 0)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> TokenIds:
    """Encode files and join them, each followed by the end-of-text token: `uint16 [tokens]`."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.uint16)
    parts: list[TokenIds] = []
    for encoding in tokenizer.encode_batch(texts):
        parts += [np.array(encoding.ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def load_corpus(work: Path) -> Corpus:
    """Read the corpus from `work`, or build it there first (about a minute on one core)."""
    tokenizer_file, ids_file = work / "tokenizer.json", work / "corpus.npz"
    if not ids_file.exists():
        _build_corpus(tokenizer_file, ids_file)
    with np.load(ids_file, allow_pickle=False) as ids:
        return Corpus(ids["train"], ids["held_out"], Tokenizer.from_file(str(tokenizer_file)))


def _build_corpus(tokenizer_file: Path, ids_file: Path) -> None:
    tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[bool, list[str]] = {False: [], True: []}
    for relative, text in library_files():
        parts[is_held_out(relative)].append(text)
    # The tokenizer sees the training part only: held-out files must not shape their own measure.
    tokenizer = train_tokenizer(parts[False])
    tokenizer.save(str(tokenizer_file))
    partial = ids_file.with_suffix(".partial.npz")
    np.savez(partial, train=encode(tokenizer, parts[False]), held_out=encode(tokenizer, parts[True]))
    partial.replace(ids_file)


def blocks(ids: TokenIds, length: int, seed: int) -> TokenIds:
    """Cut ids into non-overlapping blocks and shuffle them by `seed`: `uint16 [tokens // length, length]`."""
    count = len(ids) // length
    order = np.random.default_rng(seed).permutation(count)
    return ids[: count * length].reshape(count, length)[order]
