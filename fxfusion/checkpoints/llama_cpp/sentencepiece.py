"""BPE of SentencePiece (`tokenizer.ggml.model` "llama"): pieces with scores in place of the list of merges.

    merges of tokenizer.json        pieces of the file
    0  t h                          th   score  0
    1  th e                         the  score -1
    2  t he                         (the same piece: both ways to make it stand side by side)

llama.cpp joins the two neighbours that together are the piece of the highest score, from every pair of pieces, and of
equal ones the left; a list of merges that says anything else (a pair left out, one piece at two places) is refused.
Source: llm_tokenizer_spm in src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fxfusion.errors import CheckpointError

SPACE = "▁"
NEVER = -1e6  # of what no merge makes
_BYTES = frozenset(f"<0x{number:02X}>" for number in range(256))
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_UNKNOWN, _BYTE = 2, 6  # gguf.TokenType


def is_sentencepiece(pipeline: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is BPE that falls back to bytes `<0x00>` to `<0xFF>`."""
    model = pipeline["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def space_in_front(pipeline: Mapping[str, Any]) -> bool:
    """`tokenizer.ggml.add_space_prefix`. Raises `CheckpointError` for any other pipeline than SentencePiece's."""
    model, normalizer, cut = pipeline["model"], pipeline.get("normalizer"), pipeline.get("pre_tokenizer")
    missing = sorted(_BYTES - model["vocab"].keys())
    if missing or model.get("ignore_merges"):
        why = f"its BPE has no piece {missing[0]}" if missing else "ignore_merges = True of its BPE"
        raise CheckpointError(f"a tokenizer that GGUF has no type for: {why}")
    steps = (normalizer or {}).get("normalizers", [] if normalizer is None else [normalizer])
    prepend = {"type": "Prepend", "prepend": SPACE}
    if cut is None and steps in ([_REPLACE], [prepend, _REPLACE]):
        return prepend in steps
    given = dict(cut or {})
    scheme = given.pop("prepend_scheme", None)
    if normalizer is not None or given != {"type": "Metaspace", "replacement": SPACE, "split": False}:
        raise CheckpointError(
            "a tokenizer that GGUF has no type for: llama.cpp has no BPE with bytes that normalises by "
            f"{json.dumps(normalizer, ensure_ascii=False)} and cuts by {json.dumps(cut, ensure_ascii=False)}"
        )
    if scheme != "never":
        nor = " nor after a special token" if scheme == "first" else ""
        warnings.warn(
            "llama.cpp puts a space in front of every text and after each special token: the tokenizer does not where "
            f"a text begins with one{nor}",
            stacklevel=6,
        )
    return bool(scheme != "never")


def kinds(tokens: Sequence[str], types: list[int], unknown: int | None) -> list[int]:
    """`types` with those of bytes and of the unknown token."""
    found = [_BYTE if text in _BYTES else kind for text, kind in zip(tokens, types, strict=True)]
    if unknown is not None:
        found[unknown] = _UNKNOWN
    return found


def scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]], added: set[str]) -> list[float]:
    """Of each token. Raises `CheckpointError` where no scores say what the merges do. `added`: which text is searched
    for before anything is merged."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    found: dict[str, float] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last and piece in found:  # merges of several pieces in turn: all have one score
            found |= {one: found[piece] for one in _since(piece, found)}
        last, found[piece] = piece, found.get(piece, -float(len(found)))
    known = set(tokens) - added - _BYTES
    for piece in known:
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in known and right in known and (left, right) not in ranks:
                raise _no_scores(f"{left!r} and {right!r} are not merged to {piece!r}")
    _check_runs(ranks, found)
    return [found.get(text, NEVER) for text in tokens]


def _since(piece: str, found: Mapping[str, float]) -> list[str]:
    """What came after a piece. Raises `CheckpointError` where these are not the same character again and again."""
    pieces = [one for one, score in found.items() if score <= found[piece]]
    if len(set("".join(pieces))) > 1:
        raise _no_scores(f"merges that make {piece!r} stand at two places of its list")
    return pieces


def _check_runs(ranks: Mapping[tuple[str, str], int], found: Mapping[str, float]) -> None:
    """Raises `CheckpointError` where pieces of one score, of two neighbours the left ones first, are joined otherwise
    than by their merges."""
    counts, worse = Counter(found.values()), {piece: -score for piece, score in found.items()}
    runs = [piece for piece, score in found.items() if counts[score] > 1]
    for length in range(1, 2 * max(map(len, runs), default=0) + 2):
        by_rank = _joined(runs[0][:1] * length, ranks.get)
        by_score = _joined(runs[0][:1] * length, lambda pair: worse.get("".join(pair)))
        if by_rank != by_score:
            raise _no_scores(f"{length} of {runs[0][:1]!r} would be {by_score}, and not {by_rank}")


def _joined(text: str, order: Callable[[tuple[str, str]], float | None]) -> list[str]:
    pieces = list(text)
    while found := [(key, at) for at, pair in enumerate(pairwise(pieces)) if (key := order(pair)) is not None]:
        _, at = min(found)
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    return pieces


def _no_scores(why: str) -> CheckpointError:
    return CheckpointError(f"a tokenizer that GGUF has no type for: no scores of pieces say its BPE, since {why}")
