from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import fxfusion
from fxfusion.checkpoints.gguf.header import GgufFile, is_gguf
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints.gguf_models import HIDDEN, TOKENS, settings, write_gguf

TINY = "tiny.gguf"


def test_the_header_is_what_was_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / TINY, "Q4_1", change={"x.numbers": [1, 2], "x.flag": True})
    file = GgufFile.read(tmp_path / TINY)
    assert file.architecture == "llama" and file.types == ["Q4_1", "F32"] and file.quantised
    known = {name: value for name, value in settings().items() if not isinstance(value, float)}
    assert known.items() <= file.metadata.items() and file.metadata["x.numbers"] == [1, 2]
    assert file.metadata["tokenizer.ggml.tokens"] == len(TOKENS) and file.metadata["x.flag"] is True
    shapes = {tensor.name: (tensor.shape, tensor.kind, tensor.nbytes) for tensor in file.tensors}
    assert shapes["token_embd.weight"] == ((len(TOKENS), HIDDEN), "Q4_1", len(TOKENS) * 20)
    assert shapes["output_norm.weight"] == ((HIDDEN,), "F32", HIDDEN * 4)
    reader = gguf.GGUFReader(tmp_path / TINY)
    assert [one.name for one in reader.tensors] == [one.name for one in file.tensors]
    assert [one.n_bytes for one in reader.tensors] == [one.nbytes for one in file.tensors]


def test_a_line_tells_what_it_is(tmp_path: Path) -> None:
    write_gguf(tmp_path / TINY, "Q8_0")
    file = GgufFile.read(tmp_path / TINY)
    assert file.told() == f"{tmp_path / TINY}: llama, Q8_0 (also F32)"
    assert file.told("float32").endswith("; weights dequantised to float32") and file.dtype == "float32"
    write_gguf(tmp_path / "half.gguf", "F16")
    half = GgufFile.read(tmp_path / "half.gguf")
    assert half.told(half.dtype).endswith("llama, F16 (also F32); weights read as float16") and not half.quantised


def test_a_file_is_known_by_its_name_or_its_first_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / TINY)
    (tmp_path / "blob").symlink_to(tmp_path / TINY)
    (tmp_path / "other.gguf").write_bytes(b"")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.txt").write_text("GGU")
    assert [is_gguf(tmp_path / name) for name in (TINY, "blob", "other.gguf")] == [True] * 3
    assert not any(is_gguf(tmp_path / name) for name in ("folder.gguf", "text.txt", "nothing.gguf"))
    assert GgufFile.read(tmp_path / "blob").architecture == "llama"


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:size]


def put(place: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (cut(0), "is empty"),
        (lambda content: b"PK\x03\x04" + content[4:], r"is no GGUF file: it begins with b'PK"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS: fetch the file"),
        (cut(6), "cut short"),
        (cut(300), "cut short"),
        (cut(-1), r"cut short: output\.weight ends at byte \d+, and the file has \d+; fetch it anew"),
        (put(4, "<I", 1), "of version 1"),
        (put(4, ">I", 3), "big-endian"),
        (put(8, "<Q", 2**60), "cut short, or broken"),
        (put(16, "<Q", 2**60), "cut short, or broken"),
        (put(24, "<Q", 2**62), "cut short, or broken"),
        (lambda content: content.replace(b"general.name", b"general.n\xff\xffe"), "not UTF-8"),
        (lambda content: content.replace(b"blk.1.ffn_up.", b"blk.0.ffn_up."), r"blk\.0\.ffn_up\.weight is there twice"),
        (lambda content: content.replace(b"general.name", b"llama.vocab_"), "tiny.gguf"),
    ],
)
def test_a_file_that_is_not_whole_is_an_error_of_one_line(
    tmp_path: Path, change: Callable[[bytes], bytes], named: str
) -> None:
    write_gguf(tmp_path / TINY)
    (tmp_path / TINY).write_bytes(change((tmp_path / TINY).read_bytes()))
    with pytest.raises(CheckpointError, match=named) as caught:
        fxfusion.from_pretrained(tmp_path / TINY)
    assert str(tmp_path / TINY) in str(caught.value) and "\n" not in str(caught.value)


def test_no_byte_of_the_header_makes_another_kind_of_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / TINY, tokenizer=False)
    whole, found = (tmp_path / TINY).read_bytes(), 0
    for place in range(1500):
        (tmp_path / TINY).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            GgufFile.read(tmp_path / TINY)
        except CheckpointError as error:
            found += 1
            assert TINY in str(error)
    assert found > 500


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / TINY, "Q8_0")
    content = bytearray((tmp_path / TINY).read_bytes())
    name = b"token_embd.weight"
    kind = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes, and two lengths
    content[kind : kind + 4] = int(gguf.GGMLQuantizationType.Q8_1).to_bytes(4, "little")
    (tmp_path / TINY).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"tensors of Q8_1 \(token_embd\.weight, \.\.\.\), which .* cannot dequantise: take"
    ):
        GgufFile.read(tmp_path / TINY)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"change": {"split.count": 3, "split.no": 1}}, r"is one of 3 files: .*llama-gguf-split --merge"),
        ({"change": {"general.type": "adapter"}}, "of the type 'adapter'.*give the file of the model"),
        ({"architecture": "clip", "leave_out": "token_embd.weight"}, "no text model: 'clip'"),
        ({"tensors": {"ids": np.ones(4, np.int32)}}, r"tensors of I32 \(ids, \.\.\.\)"),
    ],
)
def test_a_file_that_is_no_readable_text_model_is_refused(tmp_path: Path, written: dict[str, Any], named: str) -> None:
    write_gguf(tmp_path / TINY, **written)
    with pytest.raises(CheckpointError, match=named):
        fxfusion.from_pretrained(tmp_path / TINY)


def test_a_vocabulary_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / TINY, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="is a vocabulary, not a model"):
        GgufFile.read(tmp_path / TINY)


def test_a_header_is_read_without_torch(tmp_path: Path) -> None:
    write_gguf(tmp_path / TINY)
    code = (
        "import sys; from fxfusion.checkpoints.gguf.header import GgufFile\n"
        f"GgufFile.read({str(tmp_path / TINY)!r}); assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
