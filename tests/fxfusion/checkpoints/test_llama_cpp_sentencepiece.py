"""BPE of SentencePiece: what the file has joins text as the tokenizer does, or the tokenizer is refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fxfusion.checkpoints.llama_cpp import sentencepiece
from fxfusion.checkpoints.llama_cpp.vocabulary import vocabulary_of
from fxfusion.errors import CheckpointError

BYTES = [f"<0x{number:02X}>" for number in range(256)]
# Best first, as SentencePiece has them; the runs of spaces have one score.
PIECES = ["th", "the", "in", "▁the", "▁t", "ing", "▁in", "he", "ab", "aba", "ba"]
RUNS = ["▁" * length for length in range(2, 9)]
LETTERS = sorted(set("".join(PIECES)))
TEXTS = ["the thing in  the ring", " the", "", "abababa bab\nthe", "a      b               the", "naïve 漢字 the", "▁"]


def merges(pieces: Sequence[str] = PIECES, runs: Sequence[str] = RUNS) -> list[tuple[str, str]]:
    """Both ways to make each piece, those of the best first; of runs the longest left part first."""
    known = {*LETTERS, *pieces, *runs}
    found = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    ways = [(run[:at], run[at:]) for run in runs for at in range(1, len(run))]
    return found + sorted(ways, key=lambda pair: (-len(pair[0]), -len(pair[1])))


def tokenizer(given: Sequence[tuple[str, str]] | None = None, legacy: bool = True, **more: Any) -> Any:
    vocab = {text: number for number, text in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES, *RUNS, *LETTERS])}
    inner = Tokenizer(models.BPE(vocab, merges() if given is None else list(given), byte_fallback=True, **more))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def settings(given: Any) -> dict[str, Any]:
    return {one.name.removeprefix("tokenizer.ggml."): one.value for one in vocabulary_of("", given, 300)}


def as_llama_cpp(found: dict[str, Any], text: str) -> list[int]:
    """Its rule, of the source that `sentencepiece.py` names: the best pair of neighbours, of equal ones the left."""
    ids = {one: number for number, one in enumerate(found["tokens"])}
    parts = list((" " * found["add_space_prefix"] + text).replace(" ", "▁")) if text else []
    while pairs := [(-found["scores"][ids[a + b]], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    tokens = []
    for part in parts:
        tokens += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return tokens


@pytest.mark.parametrize("legacy", [True, False], ids=["prepend and replace", "metaspace"])
def test_text_becomes_the_same_tokens(legacy: bool) -> None:
    given = tokenizer(legacy=legacy)
    with nullcontext() if legacy else pytest.warns(UserWarning, match="where a text begins with one$"):
        found = settings(given)
    texts = TEXTS if legacy else [text for text in TEXTS if not text.startswith((" ", "▁"))]
    assert [as_llama_cpp(found, text) for text in texts] == [given(text)["input_ids"] for text in texts]
    damaged = dict(found, scores=[*reversed(found["scores"])])
    assert as_llama_cpp(damaged, TEXTS[0]) != given(TEXTS[0])["input_ids"]


def test_what_the_file_has() -> None:
    found = settings(tokenizer())
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", True)
    assert found["token_type"][:4] == [2, 3, 3, 6] and found["token_type"][3 + 256] == 1 and "merges" not in found
    by_text = dict(zip(found["tokens"], found["scores"], strict=True))
    order = [by_text[piece] for piece in PIECES]
    assert order == sorted(order, reverse=True) and len(set(order)) == len(order)
    assert len({by_text[run] for run in RUNS[1:]}) == 1 and by_text["<s>"] == sentencepiece.NEVER
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)


def test_a_space_in_front_or_not() -> None:
    given = tokenizer(legacy=False)
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=False)
    assert settings(given)["add_space_prefix"] is False
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    with pytest.warns(UserWarning, match="where a text begins with one nor after a special token"):
        assert settings(given)["add_space_prefix"] is True


def test_merges_that_no_scores_say() -> None:
    plain = merges()
    with pytest.raises(CheckpointError, match="'▁' and 'the' are not merged to '▁the'"):
        settings(tokenizer([pair for pair in plain if pair != ("▁", "the")]))
    with pytest.raises(CheckpointError, match="merges that make 'the' stand at two places"):
        settings(tokenizer([pair for pair in plain if pair != ("t", "he")] + [("t", "he")]))
    runs = [pair for pair in plain if set("".join(pair)) == {"▁"}]
    others = [pair for pair in plain if pair not in runs]
    with pytest.raises(CheckpointError, match=r"of '▁' would be \[.*\], and not \["):
        settings(tokenizer(others + runs[::-1][:-3] + runs[:3]))


def test_pipelines_that_are_not_sentencepiece() -> None:
    given = tokenizer(legacy=False)
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    with pytest.raises(CheckpointError, match="no BPE with bytes that normalises by null and cuts by .*Metaspace"):
        settings(given)
    given = tokenizer(legacy=True)
    given.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(CheckpointError, match="no BPE with bytes that normalises by .*Lowercase"):
        settings(given)
    with pytest.raises(CheckpointError, match="ignore_merges = True of its BPE"):
        settings(tokenizer(ignore_merges=True))
    lacking = tokenizer()
    vocab = {text: at for text, at in lacking.get_vocab().items() if text != "<0x0A>"}
    inner = Tokenizer(models.BPE(vocab, merges(), byte_fallback=True))
    with pytest.raises(CheckpointError, match="its BPE has no piece <0x0A>"):
        settings(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
