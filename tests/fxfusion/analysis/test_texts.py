from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fxfusion.analysis import texts
from fxfusion.analysis.texts import batches_from_ids, batches_from_text
from fxfusion.errors import FxFusionError, OptionError

EOS, BOS, UNKNOWN = 0, 1, 2  # number n of a text is token n + 10


def make_tokenizer(bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """Words that are numbers below 500, and nothing else."""
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN, **{str(n): n + 10 for n in range(500)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"eos_token": "<eos>" if eos else None, "unk_token": "<unk>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZER = make_tokenizer()


def words(first: int, last: int) -> str:
    return " ".join(map(str, range(first, last + 1)))


def tokens(first: int, last: int) -> list[int]:
    return list(range(first + 10, last + 11))


def flat(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches).flatten().tolist()


def in_order(source: Any, length: int = 4, batch: int = 1, **settings: Any) -> list[int]:
    return flat(batches_from_text(source, TOKENIZER, length=length, batch=batch, seed=None, **settings))


def test_documents_are_joined_by_the_end_of_text_and_cut_into_rows() -> None:
    batches = batches_from_text([words(0, 4), words(5, 8)], TOKENIZER, length=3, batch=2, seed=None)
    assert [batch.tolist() for batch in batches] == [[[10, 11, 12], [13, 14, EOS]]]  # a third row fills no batch
    batches = batches_from_text([words(0, 4), words(5, 8)], TOKENIZER, length=3, batch=1, seed=None)
    assert flat(batches) == [*tokens(0, 4), EOS, *tokens(5, 7)]
    assert all(batch.shape == (1, 3) and batch.dtype == torch.int64 for batch in batches)


def test_each_row_starts_as_the_tokenizer_starts_a_text() -> None:
    batches = batches_from_text([words(0, 4)], make_tokenizer(bos=True), length=4, batch=2, seed=None)
    assert batches[0].tolist() == [[BOS, 10, 11, 12], [BOS, 13, 14, EOS]]


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "any.name"
    file.write_bytes(b"\xef\xbb\xbf" + words(0, 6).encode())
    assert in_order(file) == in_order(str(file)) == [*tokens(0, 6), EOS]
    file.write_text(words(0, 6), encoding="utf-16")
    assert in_order(file, encoding="utf-16") == [*tokens(0, 6), EOS]


def test_a_folder(tmp_path: Path) -> None:
    for name, first in {"b.txt": 0, "a/z.md": 10, "a.TXT": 20, ".hidden/c.txt": 30, "a/.c.txt": 30, "d.py": 30}.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(words(first, first + 2))
    expected = [[*tokens(first, first + 2), EOS] for first in (20, 10, 0)]  # a.TXT, a/z.md, b.txt
    found = in_order(tmp_path)
    assert sorted(found) == sorted(sum(expected, [])) and found[-4:] == expected[-1]
    assert in_order(tmp_path, suffixes=(".py",)) == [*tokens(30, 32), EOS]


class Dataset:
    """What `datasets.Dataset` offers of itself: length, rows by number, iteration over rows."""

    def __init__(self, column: str, rows: list[str]) -> None:
        self.column, self.rows = column, rows
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.read.append(number)
        return {"id": number, self.column: self.rows[number]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))


def test_a_dataset_and_its_stream() -> None:
    rows = [words(0, 2), "", " \n", words(3, 5)]
    expected = [*tokens(0, 2), EOS, *tokens(3, 5), EOS]  # blank documents leave nothing
    assert in_order(Dataset("text", rows)) == expected
    assert in_order(Dataset("body", rows), column="body") == expected
    assert in_order(iter(Dataset("text", rows))) == in_order(row for row in rows) == expected


@pytest.mark.slow
def test_the_datasets_package() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [words(0, 2), words(3, 5)]})
    expected = [*tokens(0, 2), EOS, *tokens(3, 5), EOS]
    assert in_order(rows) == in_order(rows.to_iterable_dataset()) == expected
    with pytest.raises(OptionError, match=r"dict of \['test'\]"):
        in_order(datasets.DatasetDict({"test": rows}))


def test_reading_stops_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_CHUNK_DOCUMENTS", 2)
    endless = (words(number, number + 2) for number in itertools.count())
    batches = batches_from_text(endless, TOKENIZER, length=4, batch=2, limit=3)
    assert [batch.shape for batch in batches] == [(2, 4)] * 3
    data = Dataset("text", [words(n, n + 2) for n in range(100)])
    batches_from_text(data, TOKENIZER, length=4, batch=2, limit=3)
    assert len(data.read) <= 8 and data.read != sorted(data.read)


def test_the_limit_counts_rows_without_their_start() -> None:
    tokenizer = make_tokenizer(bos=True)
    batches = batches_from_text([words(0, 99)] * 9, tokenizer, length=5, batch=2, limit=30)
    assert len(batches) == 30


def test_the_seed_decides_which_rows() -> None:
    source = [words(10 * n, 10 * n + 8) for n in range(20)]

    def rows(seed: int | None, limit: int | None = 2) -> list[list[int]]:
        return torch.cat(batches_from_text(source, TOKENIZER, length=10, batch=3, seed=seed, limit=limit)).tolist()

    assert rows(0) == rows(0) != rows(1)
    everything = rows(None, limit=None)
    assert sorted(rows(1, limit=None)) != everything != rows(1, limit=None)
    assert all(row in [[*tokens(10 * n, 10 * n + 8), EOS] for n in range(20)] for row in rows(1))
    # Rows of one long text too: not its beginning only.
    starts = [
        row[0] for row in torch.cat(batches_from_text([words(0, 499)], TOKENIZER, length=5, batch=1, limit=9)).tolist()
    ]
    assert max(starts) > 60 and starts != sorted(starts)


def test_progress_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_order([words(0, 6)], progress=True) == in_order([words(0, 6)])
    assert "read text" in capsys.readouterr().err


def test_a_long_document_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 5
    assert len(batches_from_text([words(0, 99)], tokenizer, length=4, batch=1)) == 25
    assert "longer than" not in caplog.text


# --- stored ids ---------------------------------------------------------------------------------------


def stored(folder: Path, ids: Tensor, key: str = "input_ids") -> Path:
    file = folder / "ids.safetensors"
    save_file({key: ids}, file)
    return file


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
def test_stored_blocks(tmp_path: Path, dtype: torch.dtype) -> None:
    file = stored(tmp_path, torch.arange(22).view(2, 11).to(dtype))
    batches = batches_from_ids(file, length=5, batch=2, seed=None)
    expected = [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]]]
    assert [batch.tolist() for batch in batches] == expected and batches[0].dtype == torch.int64
    assert len(batches_from_ids(file, length=5, batch=2, limit=1)) == 1


def test_a_stored_stream_needs_no_tokenizer(tmp_path: Path) -> None:
    file = stored(tmp_path, torch.arange(100, 111))
    batches = batches_from_text(file, None, length=5, batch=2, seed=None)
    assert [batch.tolist() for batch in batches] == [[[100, 101, 102, 103, 104], [105, 106, 107, 108, 109]]]
    shuffled = batches_from_text(str(file), None, length=2, batch=5, seed=0)[0]
    assert shuffled[:, 0].tolist() != [100, 102, 104, 106, 108] and sorted(shuffled[:, 0].tolist()) == [
        100,
        102,
        104,
        106,
        108,
    ]


def test_bad_stored_ids(tmp_path: Path) -> None:
    def message(file: Path, **settings: Any) -> str:
        with pytest.raises(OptionError) as caught:
            batches_from_ids(file, **{"length": 5, "batch": 1, **settings})
        return str(caught.value)

    assert "there is no file" in message(tmp_path / "none.safetensors")
    file = stored(tmp_path, torch.arange(8), key="tokens")
    assert "has no 'input_ids', but ['tokens']" in message(file)
    assert "8 tokens: one row of 9 needs 9" in message(file, key="tokens", length=9)
    assert "has 8 tokens: one batch of 3 rows of 4 needs 12" in message(file, key="tokens", length=4, batch=3)
    assert "holds blocks of 4 tokens" in message(stored(tmp_path, torch.zeros(2, 4, dtype=torch.int64)))
    assert "torch.float32 [8]" in message(stored(tmp_path, torch.zeros(8)))
    assert "torch.int64 [0]" in message(stored(tmp_path, torch.zeros(0, dtype=torch.int64)))
    whole = stored(tmp_path, torch.arange(100)).read_bytes()
    file.write_bytes(whole[:-50])
    assert "is not a whole safetensors file" in message(file)


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_files(tmp_path: Path) -> None:
    def message(source: Any, **settings: Any) -> str:
        with pytest.raises(OptionError) as caught:
            in_order(source, **settings)
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, FxFusionError)
        return str(caught.value)

    missing = tmp_path / "missing.txt"
    assert f"there is no file or folder {missing}" in message(missing)
    assert "a text itself goes into a list" in message("some words")
    assert f"{tmp_path} holds no file with .txt or .md, but nothing" in message(tmp_path)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "README").write_text("1")
    found = message(tmp_path)
    assert ".py (1)" in found and "no suffix (1)" in found and "suffixes=" in found
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    assert f"{empty} holds no text" in message(empty)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"1 2 3 \xff\xfe")
    assert f"{binary} is not utf-8 text: byte 0xff at position 6" in message(binary)
    assert "there is no encoding 'utf-9'" in message(binary, encoding="utf-9")


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed() -> None:
    with pytest.raises(OptionError, match="has 11 tokens: one batch of 3 rows of 4 needs 12; give more text"):
        in_order([words(0, 9)], batch=3)
    assert len(in_order([words(0, 10)], batch=3)) == 12
    with pytest.raises(OptionError, match="has 11 tokens: one batch of 4 rows of 4 needs 12"):
        batches_from_text([words(0, 9)], make_tokenizer(bos=True), length=4, batch=4)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], OptionError, r"the source \(list\) holds no text"),
        (["", " "], OptionError, "holds no text"),
        ({"train": [], "test": []}, OptionError, r"dict of \['test', 'train'\]"),
        ([{"body": "1"}], OptionError, r"document 0 has no column 'text', but \['body'\]"),
        ([{"text": None}], TypeError, "document 0 must be a text, got NoneType"),
        (["1", b"2"], TypeError, "document 1 must be a text, got bytes"),
        (b"1 2", TypeError, "source must be a path, texts or a dataset, got bytes"),
        (5, TypeError, "got int"),
    ],
)
def test_bad_sources(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        in_order(source)


def test_bad_tokenizers() -> None:
    def message(tokenizer: Any) -> str:
        with pytest.raises((OptionError, TypeError)) as caught:
            batches_from_text([words(0, 9)], tokenizer, length=4, batch=1)
        return str(caught.value)

    assert "text needs a tokenizer" in message(None)
    assert "must be one of transformers, got Tokenizer" in message(Tokenizer(models.BPE()))
    assert "no end-of-text token" in message(make_tokenizer(eos=False))


@pytest.mark.parametrize(("name", "value", "least"), [("length", 1, 2), ("batch", 0, 1), ("limit", 0, 1)])
def test_bad_sizes(name: str, value: int, least: int, tmp_path: Path) -> None:
    settings = {"length": 4, "batch": 1, name: value}
    with pytest.raises(OptionError, match=f"{name} must be at least {least}, got {value}"):
        batches_from_text([words(0, 9)], TOKENIZER, **settings)
    with pytest.raises(OptionError, match=f"{name} must be at least {least}"):
        batches_from_ids(tmp_path, **settings)
